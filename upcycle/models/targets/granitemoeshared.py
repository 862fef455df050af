"""GraniteMoE with a shared expert: top-k, then softmax of the selected logits; four multipliers.

Its hub layout is fused: one tensor per layer holds all experts.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from upcycle.core.types import MoELayer
from upcycle.models.runtimes import Run
from upcycle.models.targets.base import (
    TARGETS,
    Gains,
    MoESpec,
    MoETarget,
    Named,
    Routing,
    missing_biases,
    with_gain,
    with_routed_gain,
)
from upcycle.models.targets.limits import (
    heads_fill_hidden,
    no_biases,
    no_window,
    silu_only,
    unknown,
    usual_yarn,
)
from upcycle.models.traits import Architecture, Trait


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    return {"architectures": ["GraniteMoeSharedForCausalLM"], **shared_fields(arch, spec)}


def shared_fields(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    """What the classes of this line have in common."""
    fields = arch.fields
    return {
        "intermediate_size": spec.geometry.expert_size,
        "shared_intermediate_size": spec.geometry.shared_size,
        "num_local_experts": spec.geometry.num_experts,
        "num_experts_per_tok": spec.geometry.top_k,
        "attention_bias": any_bias(arch),
        # The class's default attention scale is 1, not 1 / sqrt(head_dim).
        "attention_multiplier": fields["attention_multiplier"] or arch.head_dim**-0.5,
        "embedding_multiplier": fields["embedding_multiplier"],
        "residual_multiplier": fields["residual_multiplier"],
        "logits_scaling": fields["logits_scaling"],
    }


def any_bias(arch: Architecture) -> bool:
    return bool({Trait.QKV_BIAS, Trait.O_BIAS} & set(arch.traits))


def experts(layer: MoELayer, gains: Gains) -> Named:
    yield "block_sparse_moe.router.layer.weight", layer.router_ED
    ffns = [with_routed_gain(layer.expert(e), gains) for e in range(layer.num_experts)]
    fused = [torch.cat([ffn.rows_FD, ffn.up_FD]) for ffn in ffns]
    yield "block_sparse_moe.input_linear.weight", torch.stack(fused)
    yield "block_sparse_moe.output_linear.weight", torch.stack([ffn.down_DF for ffn in ffns])
    yield from shared_mlp(layer, gains)


def shared_mlp(layer: MoELayer, gains: Gains) -> Named:
    if layer.shared is not None:
        shared = with_gain(layer.shared, gains.shared)
        yield "shared_mlp.input_linear.weight", torch.cat([shared.rows_FD, shared.up_FD])
        yield "shared_mlp.output_linear.weight", shared.down_DF


def extra(arch: Architecture, layer: Mapping[str, Tensor]) -> Named:
    """attention_bias means a bias on all four; a source with some of them gets zeros."""
    if any_bias(arch):
        yield from missing_biases(layer, "q_proj", "k_proj", "v_proj", "o_proj")


MULTIPLIERS = frozenset(
    {
        Trait.EMBEDDING_MULTIPLIER,
        Trait.RESIDUAL_MULTIPLIER,
        Trait.ATTENTION_MULTIPLIER,
        Trait.LOGITS_SCALING,
    }
)

TARGETS.add(
    "granitemoeshared",
    MoETarget(
        "granitemoeshared",
        routing=Routing("softmax", "always", shared_gate=1.0),
        dense_layers="none",
        split_rank=3,
        copy_rank=3,
        config=config,
        experts=experts,
        runtimes={
            "llama.cpp": (silu_only, no_window, usual_yarn),
            "vLLM": (silu_only, heads_fill_hidden, no_biases, usual_yarn),
            "MLX": (unknown,),
            "transformers 4": (heads_fill_hidden,),
        },
        ran={
            "llama.cpp": Run("0.5.0", "2026-11-29", "a split of SmolLM2-135M"),
            "vLLM": Run("0.32.0", "2026-11-26", "splits and copies of random models"),
            "transformers 4": Run("4.57.6", "2026-11-26", "splits and copies of random models"),
        },
        accepts=MULTIPLIERS | {Trait.QKV_BIAS, Trait.O_BIAS, Trait.UNGATED},
        extra=extra,
        lora=("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
        router="block_sparse_moe.router.weight",
    ),
)
