"""Qwen2-MoE: softmax with optional renormalisation, a gated shared expert, any layer dense.

The shared expert is multiplied by sigmoid(gate x); a gate near zero makes that 0.5, which its
down_proj makes good.

In transformers the class also does without biases and without a shared expert. Other runtimes do
not: vLLM always adds biases to q, k and v, and has no name for a shared expert of no neurons. So
both are always written, of zeros where the source has none.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from upcycle.core.types import MoELayer
from upcycle.models.runtimes import Run
from upcycle.models.targets.base import (
    LLAMA_NAMES,
    TARGETS,
    Gains,
    MoESpec,
    MoETarget,
    Named,
    Routing,
    missing_biases,
    per_expert,
    separate,
    shared_or_silent,
    with_gain,
)
from upcycle.models.targets.limits import (
    all_layers_routed,
    heads_fill_hidden,
    never_renormalises,
    no_window,
    one_window,
    silu_only,
    unscaled_rope,
    untied,
    usual_yarn,
)
from upcycle.models.traits import Architecture, Trait

# Not zero: llama.cpp computes the sigmoid of z as silu(z) / z.
SHARED_GATE = 1e-7
SILENT = 8  # neurons, all zero, of the shared expert of a layer that has none


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "intermediate_size": arch.intermediate_size,
        "moe_intermediate_size": spec.geometry.expert_size,
        "shared_expert_intermediate_size": spec.geometry.shared_size or SILENT,
        "num_experts": spec.geometry.num_experts,
        "num_experts_per_tok": spec.geometry.top_k,
        "norm_topk_prob": spec.gains.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(spec.dense_layers),
        "qkv_bias": True,
        "use_sliding_window": arch.sliding_window is not None,
        "sliding_window": arch.sliding_window,
        "layer_types": arch.fields["layer_types"],
    }


def experts(layer: MoELayer, gains: Gains) -> Named:
    yield from per_expert(layer, gains, router="mlp.gate.weight", prefix="mlp.experts.")
    yield from shared_expert(layer, gains)


def shared_expert(layer: MoELayer, gains: Gains) -> Named:
    """With its gate; a few silent neurons where there is none."""
    shared, gate_1D = shared_or_silent(layer, SILENT), layer.shared_gate_1D
    if gate_1D is None:
        shared = with_gain(shared, gains.shared)
        gate_1D = torch.full_like(layer.router_ED[:1], SHARED_GATE)
    yield from separate("mlp.shared_expert.", shared, LLAMA_NAMES)
    yield "mlp.shared_expert_gate.weight", gate_1D


def extra(arch: Architecture, layer: Mapping[str, Tensor]) -> Named:
    """The biases of a source that has none."""
    return missing_biases(layer, "q_proj", "k_proj", "v_proj")


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
        runtimes={
            "llama.cpp": (
                *(all_layers_routed, untied, never_renormalises, silu_only, no_window),
                usual_yarn,
            ),
            "vLLM": (silu_only, heads_fill_hidden, one_window, usual_yarn),
            "MLX": (
                *(all_layers_routed, untied, never_renormalises, silu_only, no_window),
                *(heads_fill_hidden, unscaled_rope),
            ),
            "transformers 4": (heads_fill_hidden, one_window),
        },
        ran={
            "llama.cpp": Run(
                "xllamacpp 2026.10.11549", "2026-11-26", "splits and copies of random models"
            ),
            "vLLM": Run("0.32.0", "2026-11-26", "splits and copies of random models"),
            "MLX": Run("mlx-lm 0.32.2", "2026-11-26", "splits and copies of random models"),
            "transformers 4": Run("4.57.6", "2026-11-26", "splits and copies of random models"),
        },
        accepts=frozenset(
            {Trait.QKV_BIAS, Trait.SLIDING_WINDOW, Trait.MIXED_WINDOW, Trait.UNGATED}
        ),
        extra=extra,
        shared_gate="mlp.shared_expert_gate",
    ),
)
