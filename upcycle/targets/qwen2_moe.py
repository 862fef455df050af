"""Qwen2-MoE: softmax with optional renormalisation, a gated shared expert, any layer dense.

The shared expert is multiplied by sigmoid(gate x); a gate near zero makes that 0.5, which its
down_proj makes good.
"""

from collections.abc import Iterator
from typing import Any

import torch

from upcycle.architecture import Architecture, Trait
from upcycle.targets.base import (
    LLAMA_NAMES,
    TARGETS,
    Gains,
    MoESpec,
    MoETarget,
    Named,
    Routing,
    all_layers_routed,
    attention_bias,
    llama_block,
    per_expert,
    separate,
    shared_or_empty,
    with_gain,
)
from upcycle.types import MoELayer

# Not zero: llama.cpp computes the sigmoid of z as silu(z) / z.
SHARED_GATE = 1e-7


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "intermediate_size": arch.intermediate_size,
        "moe_intermediate_size": spec.expert_size,
        "shared_expert_intermediate_size": spec.shared_size,
        "num_experts": spec.geometry.routed_experts,
        "num_experts_per_tok": spec.geometry.top_k,
        "norm_topk_prob": spec.gains.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(spec.dense_layers),
        "qkv_bias": attention_bias(arch),
        "use_sliding_window": arch.sliding_window is not None,
        "sliding_window": arch.sliding_window,
        "layer_types": arch.fields["layer_types"],
    }


def experts(layer: MoELayer, gains: Gains) -> Named:
    yield from per_expert(layer, gains, router="mlp.gate.weight", prefix="mlp.experts.")
    shared = with_gain(shared_or_empty(layer), gains.shared)
    yield from separate("mlp.shared_expert.", shared, LLAMA_NAMES)
    yield "mlp.shared_expert_gate.weight", torch.full_like(layer.router_ED[:1], SHARED_GATE)


def llama_cpp(arch: Architecture, spec: MoESpec) -> Iterator[str]:
    yield from all_layers_routed(spec)
    if arch.tied:
        yield "output embeddings must be tensors of their own"
    if not spec.shared_size:
        yield "there must be a shared expert"
    if spec.gains.norm_topk_prob:
        yield "weights of experts are not renormalised"
    yield from llama_block(arch, spec)


TARGETS.add(
    "qwen2_moe",
    MoETarget(
        "qwen2_moe",
        routing=Routing("softmax", "optional", shared_gate=0.5),
        dense_layers="any",
        split_rank=0,
        copy_rank=1,
        config=config,
        experts=experts,
        llama_cpp=llama_cpp,
        accepts=frozenset({Trait.QKV_BIAS, Trait.SLIDING_WINDOW, Trait.MIXED_WINDOW}),
    ),
)
