"""What a plan says in words: what a token uses, and what works, but not all that well."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from upcycle.conversion.recipe import Recipe
from upcycle.core.types import Geometry
from upcycle.models.source import DenseSource
from upcycle.models.targets import TARGETS, Combine, MoESpec, Runtime
from upcycle.models.traits import Architecture

LLAMA_CPP_MAX_EXPERTS = 512


def usage(recipe: Recipe, geometry: Geometry) -> str:
    """What a token uses of each converted FFN, in a sentence."""
    chosen = f"{geometry.top_k} of {geometry.num_experts}"
    if recipe.copies:
        shards = f" shards, of {geometry.copies} copies" if geometry.granularity > 1 else " copies"
        return f"A token uses {chosen}{shards} of each FFN."
    active = f"{100 * geometry.active_ratio:.0f} %"
    if recipe.prunes:
        return f"A token uses {active} of each FFN: {chosen} pruned copies."
    each = f"{100 * geometry.expert_size / geometry.num_neurons:.1f}"
    shared = f" and the {100 * geometry.shared_ratio:.0f} % that are always on"
    return (
        f"A token uses {active} of each FFN: {chosen} experts, {each} % each"
        f"{shared if geometry.shared_size else ''}."
    )


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


def warnings(recipe: Recipe, spec: MoESpec, target: str, dtype: torch.dtype) -> Iterator[str]:
    """Of sizes that some runtimes or kernels do not like, or that save nothing, and of copies that
    are not the dense model's equal."""
    geometry = spec.geometry
    if geometry.num_experts > LLAMA_CPP_MAX_EXPERTS:
        yield f"{geometry.num_experts} experts: llama.cpp builds before 2026-07 allow 512"
    if geometry.expert_size % 64:
        yield (
            f"{geometry.expert_size} neurons per expert is no multiple of 64: GPU kernels pad it, "
            "and tensor parallelism may not divide it"
        )
    asked, got = recipe.shared, geometry.shared_ratio
    if asked is not None and abs(asked - got) * geometry.num_neurons >= 1:
        yield f"--shared {asked:g} became {got:.3g}, so that all experts have the same width"
    if recipe.splits and geometry.top_k == geometry.num_experts:
        yield "top_k is all experts: nothing is switched off, nothing is saved"
    if recipe.copies:
        yield from _of_copies(recipe, geometry, target, dtype)


def _of_copies(
    recipe: Recipe, geometry: Geometry, target: str, dtype: torch.dtype
) -> Iterator[str]:
    """Why copies do not compute what the dense model does, before they are trained."""
    top_k, granularity = geometry.top_k, geometry.granularity
    if not geometry.whole_copies:
        whole = max(top_k // granularity, 1) * granularity
        yield (
            f"--top-k {top_k} is no multiple of --granularity {granularity}, so tokens get parts "
            "of copies: until it is trained, the result is not the dense model (--top-k "
            f"{whole} would be)"
        )
    elif granularity > 1 and dtype != torch.float32 and not TARGETS[target].groups:
        fitting = " or ".join(f"--target {name}" for name, t in TARGETS.items() if t.groups)
        yield (
            "below float32, two copies score the same on some tokens, which then get shards of "
            f"both: {fitting} keeps copies whole, and so does --dtype float32"
        )
    if recipe.spread_gain:
        yield (
            "spread_gain multiplies gate_proj, too, in which an FFN is not linear: until it is "
            "trained, the result is not the dense model"
        )


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
