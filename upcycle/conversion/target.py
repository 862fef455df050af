"""The target: which can host a model, and which of those it goes to."""

from collections.abc import Mapping

from upcycle.conversion.designing import choose_combine, has_plain_weights, needs_plain_weights
from upcycle.conversion.merging.request import Merge
from upcycle.conversion.recipe import Recipe
from upcycle.conversion.ways import WAYS, Room, Way
from upcycle.core.errors import UpcycleError
from upcycle.core.registry import suggest
from upcycle.models.targets import TARGETS, MoESpec, unplaced
from upcycle.models.traits import Architecture


def refusals(
    arch: Architecture,
    recipe: Recipe,
    dense_layers: tuple[int, ...] = (),
    merge: Merge | None = None,
) -> dict[str, str]:
    """Every target, with why it can't host this model; empty if it can."""
    experts = None if recipe.experts is None else recipe.experts * recipe.granularity
    return {
        name: target.refusal(
            arch,
            dense_layers=dense_layers,
            shared=recipe.shared,
            gated=merge is not None and merge.gates_shared(recipe.router_name),
            experts=experts,
            top_k=recipe.top_k,
        )
        for name, target in TARGETS.items()
    }


def reached(targets: Mapping[str, str]) -> list[str]:
    """The targets that can host the model."""
    return [name for name, why in targets.items() if not why]


def spec_in(recipe: Recipe, arch: Architecture, target: str) -> MoESpec:
    """What the request makes of the model in a target.

    Raises:
        UpcycleError: the target does not host it.
    """
    way = WAYS[recipe.method.name]
    dense_layers = () if recipe.keep_dense == "auto" else recipe.keep_dense
    targets = refusals(arch, recipe, dense_layers)
    if targets[target]:
        raise UpcycleError(targets[target])
    geometry = way.geometry(recipe, Room.of(arch, TARGETS[target], len(dense_layers)))
    combine = choose_combine(recipe, way, geometry, target, targets)
    return MoESpec(geometry, TARGETS[target].gains(combine, geometry), dense_layers)


def choose_target(recipe: Recipe, way: Way, arch: Architecture, targets: Mapping[str, str]) -> str:
    """The one that is asked for, or the first of those that fit.

    Args:
        targets: every target, with why it can't be chosen.

    Raises:
        UpcycleError: it does not fit, or none does.
    """
    reachable = ", ".join(reached(targets)) or "none"
    if recipe.target != "auto":
        if recipe.target not in TARGETS:
            hint = suggest(recipe.target, TARGETS)
            beside = f" (reachable: {reachable})" if way.several else ""
            raise UpcycleError(f"unknown target {recipe.target!r}{hint}{beside}")
        if targets[recipe.target]:
            raise UpcycleError(
                f"`target={recipe.target}`: {targets[recipe.target]} (reachable: {reachable})"
            )
        return recipe.target
    reachable_names = reached(targets)
    if not reachable_names:
        raise UpcycleError(
            f"no native MoE architecture hosts this model: {_unhosted(arch, targets)}"
        )
    if way.softmax_rows:
        reachable_names = _softmax(targets) or reachable_names
    if needs_plain_weights(recipe, way):
        reachable_names = [n for n in reachable_names if has_plain_weights(n)] or reachable_names
    rank = "copy_rank" if way.averages else "split_rank"
    return min(reachable_names, key=lambda name: int(getattr(TARGETS[name], rank)))


def _softmax(targets: Mapping[str, str]) -> list[str]:
    """The targets that fit and score by a softmax; none, where the model has no such host.

    Raises:
        UpcycleError: it has one, but that has no shared expert, which is asked for.
    """
    softmax = {n: why for n, why in targets.items() if TARGETS[n].routing.score == "softmax"}
    fitting = [name for name, why in softmax.items() if not why]
    lacking = [why for name, why in softmax.items() if why == f"{name} has no shared expert"]
    if lacking and not fitting:
        others = " or ".join(name for name, why in targets.items() if not why) or "none"
        raise UpcycleError(
            f"{lacking[0]}: leave it out, or choose a target that has one but scores by sigmoids "
            f"({others})"
        )
    return fitting


def _unhosted(arch: Architecture, targets: Mapping[str, str]) -> str:
    """Why no target can host the model: what none has a place for, else what each lacks; of those
    that are made for its kind, if there are any."""
    nowhere = unplaced(arch)
    if nowhere:
        return f"the source has {' and '.join(nowhere)}, which none has a place for"
    near = [name for name in targets if not TARGETS[name].misfit(arch)]
    return "; ".join(f"{name}: {targets[name]}" for name in near or targets)
