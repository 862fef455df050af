"""What a plan says beside its numbers, of conversions that work, but not all that well."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from upcycle.architecture import Architecture
from upcycle.recipe import Recipe
from upcycle.targets import TARGETS, Combine, MoESpec

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


def llama_cpp(
    recipe: Recipe,
    arch: Architecture,
    target: str,
    spec: MoESpec,
    combine: Combine,
    refusals: Mapping[str, str],
) -> Iterator[str]:
    """If llama.cpp won't run the result: why, and which targets of it would run.

    Args:
        refusals: of every target, without layers kept dense, why it can't host the model.
    """
    if recipe.keep_dense == "auto" and TARGETS[target].dense_layers != "none":
        spec = replace(spec, dense_layers=(0,))  # the likeliest, until it is measured
    obstacles = list(TARGETS[target].llama_cpp(arch, spec))
    if not obstacles:
        return

    def runs(name: str) -> bool:
        other = TARGETS[name]
        gains = other.gains(combine, spec.geometry)
        other_spec = replace(spec, gains=gains, dense_layers=())
        return other.dense_layers == "none" and not any(other.llama_cpp(arch, other_spec))

    others = [name for name, why in sorted(refusals.items()) if not why and runs(name)]
    instead = f"; it runs --target {' or '.join(others)}" if others else ""
    yield f"llama.cpp does not run this {target}: {', '.join(obstacles)}{instead}"
