"""Qwen3.5-MoE: softmax of the selected, always renormalised, a gated shared expert, every layer
sparse; attention, DeltaNet and norms are the dense model's.

All experts of a layer are one tensor, as on the hub. transformers 5.23 reads that and one tensor
for each matrix, and writes the latter, which mlx-lm 0.32 does not load.
"""

from typing import Any

from upcycle.core.types import MoELayer
from upcycle.models.runtimes import Run
from upcycle.models.targets.base import (
    TARGETS,
    Gains,
    MoESpec,
    MoETarget,
    Named,
    Routing,
    Whole,
    attention_bias,
    fused,
)
from upcycle.models.targets.limits import no_biases, silu_only, text_alone, unknown, unscaled_rope
from upcycle.models.targets.qwen2_moe import SILENT, shared_expert
from upcycle.models.traits import Architecture, Trait


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    rope = arch.fields["rope_parameters"]
    return {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "moe_intermediate_size": spec.geometry.expert_size,
        "shared_expert_intermediate_size": spec.geometry.shared_size or SILENT,
        "num_experts": spec.geometry.num_experts,
        "num_experts_per_tok": spec.geometry.top_k,
        "attention_bias": attention_bias(arch),
        "layer_types": arch.fields["layer_types"],
        # The class's own default for a missing factor is 0.25.
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
    }


def experts(layer: MoELayer, gains: Gains) -> Named:
    yield "mlp.gate.weight", layer.router_ED
    yield from fused(layer, gains, "mlp.experts.")
    yield from shared_expert(layer, gains)


TARGETS.add(
    "qwen3_5_moe",
    MoETarget(
        "qwen3_5_moe",
        model_type="qwen3_5_moe_text",
        routing=Routing("softmax", "always", shared_gate=0.5),
        dense_layers="none",
        split_rank=5,
        copy_rank=6,
        config=config,
        experts=experts,
        runtimes={
            "llama.cpp": (silu_only, no_biases),
            "vLLM": (text_alone, silu_only, no_biases),
            "MLX": (text_alone, silu_only, no_biases, unscaled_rope),
            "transformers 4": (unknown,),
        },
        ran={
            "llama.cpp": Run("0.5.0", "2026-11-29", "splits and copies of random models"),
            "MLX": Run("mlx-lm 0.32.2", "2026-11-29", "splits and copies of random models"),
        },
        accepts=frozenset({Trait.QKV_BIAS, Trait.O_BIAS, Trait.PARTIAL_ROTARY}),
        requires=frozenset({Trait.DELTA_NET}),
        whole=Whole(
            "qwen3_5_moe",
            "Qwen3_5MoeForConditionalGeneration",
            {"vision_config": "qwen3_5_moe_vision"},
        ),
        shared_gate="mlp.shared_expert_gate",
    ),
)
