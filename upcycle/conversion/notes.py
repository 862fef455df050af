"""What a plan says in words of what works, but not all that well, and of runtimes."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from upcycle.conversion.recipe import Recipe
from upcycle.conversion.ways import Way
from upcycle.core.flags import setting
from upcycle.models.source import DenseSource
from upcycle.models.targets import TARGETS, Combine, MoESpec, Runtime
from upcycle.models.traits import Architecture

LLAMA_CPP_MAX_EXPERTS = 512


def source_notes(source: DenseSource, dtype: torch.dtype) -> Iterator[str]:
    """What is not as the source's config.json says, and what the result's dtype rounds."""
    yield from source.notes
    wider = [other for other in source.dtypes if torch.promote_types(other, dtype) != dtype]
    if len(source.dtypes) > 1 and wider:
        names = [str(each).removeprefix("torch.") for each in (*wider, dtype)]
        count = sum(info.dtype in wider for info in source.tensors.values())
        yield (
            f"the source is of several dtypes: {count} tensors in {' and '.join(names[:-1])} are "
            f"rounded to {names[-1]}, as in transformers; --dtype float32 keeps them as they are"
        )


def warnings(
    recipe: Recipe,
    way: Way,
    spec: MoESpec,
    target: str,
    targets: Mapping[str, str],
    dtype: torch.dtype,
) -> Iterator[str]:
    """Of sizes that some runtimes or kernels do not like, or that save nothing, and of what is
    not the dense model's equal though it could be.

    Args:
        targets: every target, with the reason that it is refused, or an empty string.
    """
    geometry = spec.geometry
    if geometry.num_experts > LLAMA_CPP_MAX_EXPERTS:
        yield f"{geometry.num_experts} experts: llama.cpp builds before 2026-07 allow 512"
    if geometry.expert_size % 64:
        yield (
            f"{geometry.expert_size} neurons per expert is no multiple of 64: GPU kernels pad it, "
            "and tensor parallelism may not divide it"
        )
    least = TARGETS[target].routing.least_spread(dtype)
    if recipe.router_spread is not None and recipe.router_spread < least:
        yield (
            f"{setting('router_spread', recipe.router_spread)}: {target} rounds scores to "
            f"{str(dtype).removeprefix('torch.')}, in which many tie unless logits spread by "
            f"{least:g}"
        )
    asked, got = recipe.shared, geometry.shared_ratio
    if asked is not None and abs(asked - got) * geometry.num_neurons >= 1:
        yield f"--shared {asked:g} became {got:.3g}, so that all experts have the same width"
    others = [TARGETS[name] for name, why in targets.items() if not why]
    yield from way.notes(recipe, geometry, TARGETS[target], others, dtype)


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
    dense layers, where the target has none."""
    made = TARGETS[target]
    dense_layers = spec.dense_layers
    if recipe.keep_dense == "auto":
        dense_layers = (0,)  # the likeliest, until it is measured
    if made.dense_layers == "none":
        dense_layers = ()
    refusal = made.refusal(
        arch, dense_layers=dense_layers, shared=recipe.shared, experts=spec.geometry.num_experts
    )
    if refusal:
        return [refusal]
    gains = made.gains(combine, spec.geometry)
    spec = replace(spec, gains=gains, dense_layers=dense_layers)
    said = (limit(arch, spec) for limit in made.runtimes[runtime])
    return [obstacle for obstacle in said if obstacle]
