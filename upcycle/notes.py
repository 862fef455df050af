"""What a plan says beside its numbers, of conversions that work, but not all that well."""

from collections.abc import Iterator
from dataclasses import replace

from upcycle.architecture import Architecture
from upcycle.recipe import Recipe
from upcycle.targets import TARGETS, Combine, MoESpec, Runtime

LLAMA_CPP_MAX_EXPERTS = 512


def warnings(recipe: Recipe, spec: MoESpec) -> Iterator[str]:
    """Of sizes that some runtimes or kernels do not like, or that save nothing."""
    geometry = spec.geometry
    if geometry.routed_experts > LLAMA_CPP_MAX_EXPERTS:
        yield f"{geometry.routed_experts} experts: llama.cpp builds before 2026-07 allow 512"
    if spec.expert_size % 64:
        yield (
            f"{spec.expert_size} neurons per expert is no multiple of 64: GPU kernels pad it, and "
            "tensor parallelism may not divide it"
        )
    if recipe.splits and geometry.top_k == geometry.routed_experts:
        yield "top_k is all routed experts: nothing is switched off, nothing is saved"


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
        instead = f"; it runs --target {' or '.join(others)}" if others else ""
        refusals[runtime] = f"{', '.join(reasons)}{instead}"
    return refusals


def _obstacles(
    runtime: Runtime,
    recipe: Recipe,
    arch: Architecture,
    target: str,
    spec: MoESpec,
    combine: Combine,
) -> list[str]:
    """What keeps the runtime from the target, or the model from being converted to it at all; of
    dense layers, where the target has none."""
    made = TARGETS[target]
    dense_layers = spec.dense_layers
    if recipe.keep_dense == "auto":
        dense_layers = (0,)  # the likeliest, until it is measured
    if made.dense_layers == "none":
        dense_layers = ()
    refusal = made.refusal(arch, spec.geometry, dense_layers)
    if refusal:
        return [refusal]
    gains = made.gains(combine, spec.geometry)
    spec = replace(spec, gains=gains, dense_layers=dense_layers)
    said = (limit(arch, spec) for limit in made.runtimes[runtime])
    return [obstacle for obstacle in said if obstacle]
