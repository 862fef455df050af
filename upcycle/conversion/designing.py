"""From a recipe to its design: which methods make the experts, and how these count together."""

from collections.abc import Mapping

import torch

from upcycle.conversion.design import Design, Methods
from upcycle.conversion.geometry import active_ffn_ratio
from upcycle.conversion.merging.finished import Finished
from upcycle.conversion.merging.request import Merge
from upcycle.conversion.merging.rest import check_rest
from upcycle.conversion.merging.sources import Sources
from upcycle.conversion.recipe import Recipe
from upcycle.conversion.ways import Room, Way
from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.registry import check_parameters
from upcycle.core.types import Geometry
from upcycle.models.source import DenseSource
from upcycle.models.targets import TARGETS, Combine
from upcycle.models.traits import Architecture, Trait

SPREAD, UNFITTED_SPREAD = 0.1, 0.01
"""Of a router's logits where a refit knows of the uneven weights that they make, and where none
does: as large as costs little (docs/concepts/identity.md), so that training finds an ordinary
router."""
EXACT_SPREAD = 1e-4
"""Where copies must each count 1, though weights are not renormalised: softmax is then constant
within the check's tolerance."""
MOST_FEEDBACK = 0.5  # unless more is asked for


def bound_methods(
    recipe: Recipe, way: Way, sources: Sources | None, finished: Finished | None
) -> Methods:
    """Those of a recipe that goes with the way, if as many models are there as that takes.

    Raises:
        UpcycleError: it does not, or there are more or fewer.
    """
    methods = Methods.of(recipe, way.default_router, gates=way.several)
    if methods.perturb is None:
        check_parameters(f"method {way.name!r}", recipe.method.params, ())
    if way.several and sources is None:
        raise UpcycleError(f"`method={way.name}` takes several models: upcycle {way.name} MODEL…")
    if not way.several and methods.rest.name != "base":
        raise UpcycleError(f"`rest={methods.rest.name}` goes with upcycle merge: here is one model")
    way.check(recipe, methods)
    if sources is not None and finished is None:
        check_rest(sources, methods.rest)
    return methods


def choose_combine(
    recipe: Recipe, way: Way, geometry: Geometry, target: str, targets: Mapping[str, str]
) -> Combine:
    """A split is a sum, copies are averaged, unless their router needs plain weights: then whole
    ones count 1 each."""
    if not way.averages:
        return "sum"
    never = TARGETS[target].routing.renormalises == "never"
    if not never and not needs_plain_weights(recipe, way):
        return "mean"
    if recipe.spread_gain:
        return "plain" if has_plain_weights(target) else "mean"
    if not has_plain_weights(target):
        others = [name for name, why in targets.items() if not why and has_plain_weights(name)]
        choose = f"choose `target={' or '.join(others)}`, " if others else ""
        raise UpcycleError(
            f"`top_k=1` gives each token one expert, and {target} always renormalises "
            f"its weight, so the router would get no gradient: raise `top_k`, {choose}or pass "
            f"{setting('allow_frozen_router', True)}"
        )
    return "sum" if geometry.whole_copies else "plain"


def needs_plain_weights(recipe: Recipe, way: Way) -> bool:
    """When a token gets one expert only, its renormalised weight is constant, and the router would
    get no gradient. (One copy of several shards learns by how it weights these.)"""
    one = way.averages and recipe.top_k == 1 and not recipe.allow_frozen_router
    return one or recipe.spread_gain


def has_plain_weights(target: str) -> bool:
    """Whether an expert may count what the router's softmax makes of it."""
    return TARGETS[target].routing.renormalises != "always"


def design_of(
    recipe: Recipe,
    way: Way,
    methods: Methods,
    source: DenseSource,
    target: str,
    geometry: Geometry,
    combine: Combine,
    room: Room,
    merge: Merge | None,
) -> Design:
    """What every FFN becomes, with what the recipe leaves open decided."""
    compensates = bool(methods.compensate.method.refits)
    routing = TARGETS[target].routing
    dtype = source.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    least = max(SPREAD if compensates else UNFITTED_SPREAD, routing.least_spread(dtype))
    gains = TARGETS[target].gains(combine, geometry)
    return Design(
        methods=methods,
        geometry=geometry,
        combine=combine,
        routing=routing,
        gains=gains.over_three_matrices() if recipe.spread_gain else gains,
        router_spread=EXACT_SPREAD if way.averages else recipe.router_spread or least,
        sequential=recipe.sequential and way.lossy,
        feedback=_feedback(recipe, way, methods, source.arch, geometry, room),
        dtype=dtype,
        seed=recipe.seed,
        merge=merge,
    )


def _feedback(
    recipe: Recipe,
    way: Way,
    methods: Methods,
    arch: Architecture,
    geometry: Geometry,
    room: Room,
) -> float:
    """How much of what was lost before a layer's refit makes up for: nothing where the FFN's output
    is not what is added to the hidden states, or where that helps no more than it harms."""
    follows = way.takes_feedback and recipe.sequential and methods.compensate.method.refits
    if not follows or Trait.POST_NORM in arch.traits:
        return 0.0
    asked = getattr(methods.compensate.params, "feedback", 0.0)
    if asked is not None:
        return float(asked)
    return min(MOST_FEEDBACK, active_ffn_ratio(geometry, room.layers, room.num_dense))
