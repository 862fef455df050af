"""What a plan says in words of what works, but not all that well."""

from collections.abc import Collection, Iterator

import torch

from upcycle.conversion.design import Design
from upcycle.conversion.geometry import active_ffn_ratio
from upcycle.conversion.recipe import Recipe
from upcycle.conversion.ways import Way
from upcycle.core.flags import setting
from upcycle.core.words import count
from upcycle.models.source import DenseSource
from upcycle.models.targets import TARGETS, MoESpec
from upcycle.models.traits import Architecture

LLAMA_CPP_MAX_EXPERTS = 512


def source_notes(source: DenseSource, dtype: torch.dtype) -> Iterator[str]:
    """What is not as the source's config.json says, what it lacks, and what the result's dtype
    rounds."""
    yield from source.notes
    if source.arch.encoder:
        yield (
            "the source is an encoder: no layer is kept dense unless `keep_dense` names it, and "
            "the check compares hidden states, for there is no next token to predict"
        )
    wider = [other for other in source.dtypes if torch.promote_types(other, dtype) != dtype]
    if len(source.dtypes) > 1 and wider:
        names = [str(each).removeprefix("torch.") for each in (*wider, dtype)]
        count = sum(info.dtype in wider for info in source.tensors.values())
        yield (
            f"the source is of several dtypes: {count} tensors in {' and '.join(names[:-1])} are "
            f"rounded to {names[-1]}, as in transformers; `dtype=float32` keeps them as they are"
        )


def layout_notes(
    source: DenseSource, arch: Architecture, target: str, spec: MoESpec
) -> Iterator[str]:
    """What is stored otherwise than in the source."""
    if twice := doubled(arch, target, spec):
        yield twice
    if source.arch.tied and not arch.tied:
        more = arch.hidden_size * int(arch.fields["vocab_size"])
        yield (
            "the output embeddings, tied in the source, become a tensor of their own: "
            f"{count(more)} parameters more"
        )


def doubled(arch: Architecture, target: str, spec: MoESpec) -> str:
    """What it costs that an FFN's first matrix is stored twice, as a sentence without its point;
    empty if it is not."""
    if not TARGETS[target].doubles(arch):
        return ""
    active = active_ffn_ratio(spec.geometry, len(arch.ffn_layers), len(spec.dense_layers))
    work = 1.5 * active
    return (
        f"{target} has gates, which {arch.family} has not: the first matrix of an FFN is stored "
        "twice, and a neuron costs 3/2 in parameters and work, so that "
        f"{100 * active:.0f} % of the neurons are {100 * work:.0f} % of the dense FFN's work"
        + (", which saves nothing" if work >= 1 else "")
    )


def warnings(
    recipe: Recipe, way: Way, spec: MoESpec, target: str, design: Design, hosts: Collection[str]
) -> Iterator[str]:
    """Of sizes that some runtimes or kernels do not like, or that save nothing, and of what is
    not the dense model's equal though it could be.

    Args:
        hosts: the targets in reach.
    """
    geometry = spec.geometry
    if geometry.num_experts > LLAMA_CPP_MAX_EXPERTS:
        yield f"{geometry.num_experts} experts: llama.cpp builds before 2026-07 allow 512"
    if geometry.expert_size % 64:
        yield (
            f"{geometry.expert_size} neurons per expert is no multiple of 64: GPU kernels pad it, "
            "and tensor parallelism may not divide it"
        )
    least = TARGETS[target].routing.least_spread(design.dtype)
    if recipe.router_spread is not None and recipe.router_spread < least:
        dtype = str(design.dtype).removeprefix("torch.")
        yield (
            f"{setting('router_spread', recipe.router_spread)}: {target} rounds scores to {dtype}, "
            f"in which many tie unless logits spread by {least:g}"
        )
    asked, got = recipe.shared, geometry.shared_ratio
    if asked is not None and abs(asked - got) * geometry.num_neurons >= 1:
        experts, size = geometry.num_experts, geometry.expert_size
        yield f"`shared={asked:g}` became {got:.3g}: {experts} experts of {size} neurons leave that"
    compensate, tokens = design.methods.compensate, recipe.calibration_tokens
    if tokens < compensate.method.descends_from:
        yield (
            f"{setting('compensate', compensate.name)} refits in closed form alone: its steps take "
            f"{compensate.method.descends_from:,} tokens, and {tokens:,} are given"
        )
    for field in way.void:
        chosen = getattr(recipe, field)
        if chosen != Recipe.model_fields[field].default:
            name = setting("method", way.name)
            yield f"{setting(field, chosen)} changes nothing here: {name} has no use for it"
    yield from way.notes(recipe, design, TARGETS[target], hosts)
