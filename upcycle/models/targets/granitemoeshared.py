"""GraniteMoE with a shared expert: top-k, then softmax of the selected logits; four multipliers.

Its hub layout is fused: one tensor per layer holds all experts.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from upcycle.core.types import MoELayer
from upcycle.models.targets.base import (
    TARGETS,
    Gains,
    MoESpec,
    MoETarget,
    Named,
    Routing,
    attention_bias,
    with_gain,
    with_routed_gain,
)
from upcycle.models.targets.limits import (
    heads_fill_hidden,
    no_biases,
    no_window,
    silu_only,
    unknown,
)
from upcycle.models.traits import Architecture, Trait


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    fields = arch.fields
    return {
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "intermediate_size": spec.geometry.expert_size,
        "shared_intermediate_size": spec.geometry.shared_size,
        "num_local_experts": spec.geometry.num_experts,
        "num_experts_per_tok": spec.geometry.top_k,
        "attention_bias": attention_bias(arch),
        # The class's default attention scale is 1, not 1 / sqrt(head_dim).
        "attention_multiplier": fields["attention_multiplier"] or arch.head_dim**-0.5,
        "embedding_multiplier": fields["embedding_multiplier"],
        "residual_multiplier": fields["residual_multiplier"],
        "logits_scaling": fields["logits_scaling"],
    }


def experts(layer: MoELayer, gains: Gains) -> Named:
    yield "block_sparse_moe.router.layer.weight", layer.router_ED
    ffns = [with_routed_gain(layer.expert(e), gains) for e in range(layer.num_experts)]
    fused = [torch.cat([ffn.rows_FD, ffn.up_FD]) for ffn in ffns]
    yield "block_sparse_moe.input_linear.weight", torch.stack(fused)
    yield "block_sparse_moe.output_linear.weight", torch.stack([ffn.down_DF for ffn in ffns])
    if layer.shared is not None:
        shared = with_gain(layer.shared, gains.shared)
        yield "shared_mlp.input_linear.weight", torch.cat([shared.rows_FD, shared.up_FD])
        yield "shared_mlp.output_linear.weight", shared.down_DF


def extra(arch: Architecture, layer: Mapping[str, Tensor]) -> Named:
    """attention_bias means a bias on the output too; a source without one gets zeros."""
    if Trait.QKV_BIAS in arch.traits and Trait.O_BIAS not in arch.traits:
        yield "self_attn.o_proj.bias", torch.zeros_like(layer["self_attn.o_proj.weight"][:, 0])


TARGET = MoETarget(
    "granitemoeshared",
    routing=Routing("softmax", "always", shared_gate=1.0),
    dense_layers="none",
    split_rank=3,
    copy_rank=3,
    config=config,
    experts=experts,
    runtimes={
        "llama.cpp": (silu_only, no_window),
        "vLLM": (silu_only, heads_fill_hidden, no_biases),
        "MLX": (unknown,),
        "transformers 4": (heads_fill_hidden,),
    },
    accepts=frozenset(
        {
            Trait.QKV_BIAS,
            Trait.O_BIAS,
            Trait.EMBEDDING_MULTIPLIER,
            Trait.RESIDUAL_MULTIPLIER,
            Trait.ATTENTION_MULTIPLIER,
            Trait.LOGITS_SCALING,
            Trait.UNGATED,
        }
    ),
    extra=extra,
    lora=("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
    router="block_sparse_moe.router.weight",
)
TARGETS.add("granitemoeshared", TARGET)
