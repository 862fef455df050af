"""Which runtimes run a result, and what is chosen so that those run it that were asked for."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from upcycle.conversion.recipe import Recipe
from upcycle.conversion.target import spec_in
from upcycle.core.errors import UpcycleError
from upcycle.models.runtimes import RUNTIMES, Runtime
from upcycle.models.targets import TARGETS, Combine, MoESpec
from upcycle.models.targets.base import Limit
from upcycle.models.targets.limits import looks_back, no_moe_inside
from upcycle.models.traits import Architecture

Refusals = dict[str, str]
"""Every target, with why it can't be chosen; empty if it can."""
IN_GENERAL: Mapping[Runtime, tuple[Limit, ...]] = {
    "llama.cpp": (looks_back, no_moe_inside),
    "vLLM": (looks_back,),
    "MLX": (looks_back, no_moe_inside),
    "transformers 4": (looks_back,),
}
"""What holds whatever the target."""


def obstacles(
    runtimes: Iterable[Runtime], arch: Architecture, target: str, spec: MoESpec
) -> Iterator[str]:
    """What keeps each of these runtimes from running this in the target, as a sentence."""
    for runtime in runtimes:
        said = _limits(runtime, arch, target, spec)
        if said:
            yield f"{runtime} does not run it: {', '.join(said)}"


def _limits(runtime: Runtime, arch: Architecture, target: str, spec: MoESpec) -> list[str]:
    limits = (*IN_GENERAL[runtime], *TARGETS[target].runtimes[runtime])
    said = (limit(arch, spec) for limit in limits)
    return [obstacle for obstacle in said if obstacle]


def for_runtimes(
    recipe: Recipe, arch: Architecture, targets: Mapping[str, str]
) -> tuple[Architecture, Refusals]:
    """The refusals of the targets with those of the runtimes that are asked for; and the
    architecture, whose output embeddings become tensors of their own if no target does else.

    Args:
        targets: every target, with why it can't host the model.

    Raises:
        UpcycleError: no target runs there that hosts the model; the sentence says why, and what
            would.
    """
    hosts = [name for name, why in targets.items() if not why]
    if not recipe.runtimes or not hosts or recipe.target not in ("auto", *TARGETS):
        return arch, dict(targets)
    wanted = hosts if recipe.target == "auto" else [recipe.target]
    for layout in (arch, arch.untied()) if arch.tied else (arch,):
        held = {name: why or _refusal(recipe, layout, name) for name, why in targets.items()}
        if not all(held[name] for name in wanted):
            return layout, held
    if not all(held.values()):  # other targets run there than the one that is asked for
        return layout, held
    if recipe.target != "auto" and targets[recipe.target]:
        return arch, dict(targets)
    asked = recipe.model_copy(update={"runtimes": ()})
    if all(_refusal(asked, arch, name) for name in wanted):
        return arch, dict(targets)  # nothing could run this, which the plan goes on to say
    reasons = "; ".join(f"{name}: {held[name]}" for name in hosts)
    raise UpcycleError(
        f"{_flags(recipe.runtimes)}: no target of this model runs there: {reasons}; "
        f"{_instead(recipe, layout)}"
    )


def _refusal(recipe: Recipe, arch: Architecture, target: str) -> str:
    """Why a target can't be chosen: it does not host what is asked, or a runtime's limit."""
    try:
        spec = spec_in(recipe, arch, target)
    except UpcycleError as error:
        return str(error)
    return "; ".join(obstacles(recipe.runtimes, arch, target, spec))


def _instead(recipe: Recipe, arch: Architecture) -> str:
    """What could be asked for in its place: less that is fixed, one of several runtimes, or another
    one."""
    changes: dict[str, dict[str, Any]] = {}
    if recipe.keep_dense not in ("auto", ()):
        changes["`keep_dense=none`"] = {"keep_dense": ()}
    if recipe.shared:
        changes["`shared=0`"] = {"shared": 0.0}
    several = recipe.runtimes if len(recipe.runtimes) > 1 else ()
    others = [name for name in RUNTIMES if name not in recipe.runtimes]
    changes |= {f"{_flags([name])} alone": {"runtimes": (name,)} for name in several}
    changes |= {_flags([name]): {"runtimes": (name,)} for name in others}
    found = []
    for words, change in changes.items():
        changed = recipe.model_copy(update={"target": "auto"} | change)
        run = [name for name in TARGETS if not _refusal(changed, arch, name)]
        found += [f"{words} gives {' or '.join(run)}"] if run else []
    return ", ".join(found) or "transformers 5 runs it, without `runtimes`"


def _flags(runtimes: Iterable[Runtime]) -> str:
    return f"`runtimes={','.join(name.replace(' ', '-') for name in runtimes)}`"


def takes_dense_layers(
    runtimes: Iterable[Runtime], arch: Architecture, target: str, spec: MoESpec
) -> bool:
    """Whether these runtimes run the target with at least some one layer dense."""
    if TARGETS[target].dense_layers == "none":
        return False
    choices = (replace(spec, dense_layers=(layer,)) for layer in range(arch.num_layers))
    return any(not any(obstacles(runtimes, arch, target, choice)) for choice in choices)


def runtime_refusals(
    recipe: Recipe, arch: Architecture, target: str, spec: MoESpec, combine: Combine
) -> dict[Runtime, str]:
    """Every runtime, with why it won't run the result and which targets of it would run; empty if
    it does."""
    refusals = dict.fromkeys(TARGETS[target].runtimes, "")
    for runtime in refusals:
        reasons = _obstacles(runtime, recipe, arch, target, spec, combine)
        if not reasons:
            continue
        others = [
            name
            for name in sorted(TARGETS)
            if not _obstacles(runtime, recipe, arch, name, spec, combine)
        ]
        instead = f"; it runs `target={' or '.join(others)}`" if others else ""
        refusals[runtime] = f"{', '.join(reasons)}{instead}"
    return refusals


def runtimes_lost(
    recipe: Recipe, arch: Architecture, target: str, spec: MoESpec, combine: Combine
) -> list[Runtime]:
    """The runtimes that do not run the result because some of its layers are dense."""
    split = replace(spec, dense_layers=())
    without = recipe.model_copy(update={"keep_dense": ()})
    return [
        name
        for name in TARGETS[target].runtimes
        if _obstacles(name, recipe, arch, target, spec, combine)
        and not _obstacles(name, without, arch, target, split, combine)
    ]


def _obstacles(
    runtime: Runtime,
    recipe: Recipe,
    arch: Architecture,
    target: str,
    spec: MoESpec,
    combine: Combine,
) -> list[str]:
    """What keeps the runtime from the target, or the model from being converted to it at all; of
    dense layers, where the target and the runtimes asked for have any."""
    made = TARGETS[target]
    spec = replace(spec, gains=made.gains(combine, spec.geometry))
    if recipe.keep_dense == "auto":  # until it is measured, the likeliest
        spec = replace(spec, dense_layers=(0,))
    if not takes_dense_layers(recipe.runtimes, arch, target, spec):
        spec = replace(spec, dense_layers=())
    refusal = made.refusal(
        arch,
        dense_layers=spec.dense_layers,
        shared=recipe.shared,
        experts=spec.geometry.num_experts,
    )
    return [refusal] if refusal else _limits(runtime, arch, target, spec)
