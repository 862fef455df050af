"""From a merge's request to its plan."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle.conversion.merging.request import Request, recipe_settings
from upcycle.conversion.merging.sources import open_sources
from upcycle.conversion.plan import Plan, make_plan
from upcycle.conversion.recipe import load_recipe


def plan_merge(
    request: Request,
    given: Mapping[str, Any],
    out: Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> Plan:
    """The plan of a merge.

    Args:
        given: fields of the recipe that were asked for besides.
        out: where the result would go.

    Raises:
        UpcycleError: a model can't be read or merged with the others, or the plan can't be made.
    """
    recipe = load_recipe("default", recipe_settings(request, given))
    sources = open_sources(request.merge)
    return make_plan(
        sources.base,
        recipe,
        out,
        sources=sources,
        notes=(*request.notes, *sources.notes),
        overwrite=overwrite,
        resume=resume,
    )
