"""Qwen3-MoE: softmax with optional renormalisation, any layer dense, a norm per head on q and k."""

from functools import partial
from typing import Any

from upcycle.models.runtimes import Run
from upcycle.models.targets.base import (
    TARGETS,
    MoESpec,
    MoETarget,
    Routing,
    attention_bias,
    per_expert,
)
from upcycle.models.targets.limits import (
    all_layers_routed,
    always_renormalises,
    no_biases,
    no_output_bias,
    no_window,
    silu_only,
    unscaled_rope,
    usual_yarn,
)
from upcycle.models.traits import Architecture, Trait


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "intermediate_size": arch.intermediate_size,
        "moe_intermediate_size": spec.geometry.expert_size,
        "num_experts": spec.geometry.num_experts,
        "num_experts_per_tok": spec.geometry.top_k,
        "norm_topk_prob": spec.gains.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(spec.dense_layers),
        "attention_bias": attention_bias(arch),
        "use_sliding_window": arch.sliding_window is not None,
        "sliding_window": arch.sliding_window,
    }


TARGETS.add(
    "qwen3_moe",
    MoETarget(
        "qwen3_moe",
        routing=Routing("softmax", "usually", shared_gate=None),
        dense_layers="any",
        split_rank=1,
        copy_rank=2,
        config=config,
        experts=partial(per_expert, router="mlp.gate.weight", prefix="mlp.experts."),
        runtimes={
            "llama.cpp": (
                *(all_layers_routed, always_renormalises, silu_only, no_window),
                usual_yarn,
            ),
            "vLLM": (silu_only, no_output_bias, usual_yarn),
            "MLX": (silu_only, no_biases, no_window, unscaled_rope),
            "transformers 4": (),
        },
        ran={
            "llama.cpp": Run(
                "xllamacpp 2026.10.11549", "2026-11-26", "splits and copies of random models"
            ),
            "vLLM": Run("0.32.0", "2026-11-26", "splits and copies of random models"),
            "MLX": Run("mlx-lm 0.32.2", "2026-11-26", "splits and copies of random models"),
            "transformers 4": Run("4.57.6", "2026-11-26", "splits and copies of random models"),
        },
        accepts=frozenset({Trait.QKV_BIAS, Trait.O_BIAS, Trait.SLIDING_WINDOW}),
        requires=frozenset({Trait.QK_NORM}),
    ),
)
