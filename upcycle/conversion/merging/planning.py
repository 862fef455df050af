"""From a merge's request to its plan."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from upcycle.conversion.merging.addition import Addition, addition_recipe
from upcycle.conversion.merging.finished import (
    Finished,
    base_of,
    open_finished,
    weights_of,
    with_others,
)
from upcycle.conversion.merging.request import Merge, Request, recipe_settings
from upcycle.conversion.merging.sources import open_sources
from upcycle.conversion.plan import Plan
from upcycle.conversion.planning import make_plan
from upcycle.conversion.recipe import load_recipe
from upcycle.models.record.file import TEXTUAL


def plan_merge(
    request: Request | Addition,
    given: Mapping[str, Any],
    out: Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> Plan:
    """The plan of a merge, or of an expert more for one.

    Args:
        given: fields of the recipe that were asked for besides.
        out: where the result would go.

    Raises:
        UpcycleError: a model can't be read or merged with the others, or the plan can't be made.
    """
    if isinstance(request, Addition):
        return _plan_addition(request, given, out, overwrite=overwrite, resume=resume)
    recipe = load_recipe("default", recipe_settings(request, given))
    sources = open_sources(request.merge, recipe.rest.name)
    return make_plan(
        sources.base,
        recipe,
        out,
        sources=sources,
        notes=(*request.notes, *sources.notes),
        overwrite=overwrite,
        resume=resume,
    )


def _plan_addition(
    request: Addition,
    given: Mapping[str, Any],
    out: Path | None,
    *,
    overwrite: bool,
    resume: bool,
) -> Plan:
    found, record = open_finished(request)
    recipe = addition_recipe(request, record, given)
    base = base_of(request, record, found.folder)
    added = open_sources(Merge(base, (request.expert,)))
    router = recipe.router_name
    finished = Finished(request, record, weights_of(request, found, added.base, router))
    return make_plan(
        added.base,
        recipe,
        out,
        sources=with_others(added, finished),
        finished=finished,
        notes=(*added.notes, *_addition_notes(finished, router)),
        overwrite=overwrite,
        resume=resume,
    )


def _addition_notes(finished: Finished, router: str) -> Iterator[str]:
    if router not in TEXTUAL:
        return
    if router == "domain":
        yield (
            "the projector knows only what tells the experts apart that there were: train the "
            "routers a little"
        )
        return
    if finished.unknown:
        names = ", ".join(map(str, finished.unknown))
        yield (
            f"the text of expert {names} is not here, so the new row is fitted against builtin "
            "text in its place: `text=NAME=FILE` gives it"
        )
    if router in ("loss", "perplexity"):
        yield "the base's losses stand for those of the experts that there are"
