"""GLM-4-MoE: sigmoid scores times a factor, an ungated shared expert, the first layers dense.

A tempered router scores 0.5 everywhere, so `routed_scaling_factor: 2` makes every weight 1 and
no weight needs a gain.

Experts can be in groups, of which a token gets the best: the shards of a copy are one, so that a
token gets whole copies even where two copies score the same.
"""

from typing import Any

import torch

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
    attention_bias,
    copy_groups,
    per_expert,
    separate,
    shared_or_silent,
    with_gain,
)
from upcycle.models.targets.limits import (
    no_window,
    shared_needed,
    silu_only,
    unscaled_rope,
    untied,
    usual_yarn,
)
from upcycle.models.traits import Architecture, Trait


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    geometry = spec.geometry
    # The class's own default for a missing factor is 0.5.
    rope = {"partial_rotary_factor": 1.0} | arch.fields["rope_parameters"]
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "intermediate_size": arch.intermediate_size,
        "moe_intermediate_size": spec.geometry.expert_size,
        "n_routed_experts": geometry.num_experts,
        "n_shared_experts": geometry.shared_size // geometry.expert_size,
        "num_experts_per_tok": geometry.top_k,
        "norm_topk_prob": spec.gains.norm_topk_prob,
        "routed_scaling_factor": spec.gains.scale,
        **copy_groups(geometry),
        "first_k_dense_replace": len(spec.dense_layers),
        "num_mtp_layers": 0,
        "num_nextn_predict_layers": 0,
        "attention_bias": attention_bias(arch),
        "use_qk_norm": Trait.QK_NORM in arch.traits,
        "rope_parameters": rope,
        "partial_rotary_factor": rope["partial_rotary_factor"],
    }


def experts(layer: MoELayer, gains: Gains) -> Named:
    yield from per_expert(layer, gains, router="mlp.gate.weight", prefix="mlp.experts.")
    yield (
        "mlp.gate.e_score_correction_bias",
        torch.zeros_like(layer.router_ED[:, 0], dtype=torch.float32),
    )
    shared = with_gain(shared_or_silent(layer, 0), gains.shared)
    yield from separate("mlp.shared_experts.", shared, LLAMA_NAMES)


def glms_tokenizer(arch: Architecture, spec: MoESpec) -> str:
    """Only GLM's own tokenizers are converted."""
    return "only GLM's own tokenizers are converted"


TARGETS.add(
    "glm4_moe",
    MoETarget(
        "glm4_moe",
        routing=Routing("sigmoid", "optional", shared_gate=1.0, scales=True),
        dense_layers="prefix",
        split_rank=2,
        copy_rank=4,
        config=config,
        experts=experts,
        runtimes={
            "llama.cpp": (glms_tokenizer,),
            "vLLM": (shared_needed, silu_only, usual_yarn),
            "MLX": (shared_needed, untied, silu_only, no_window, unscaled_rope),
            "transformers 4": (),
        },
        ran={
            "vLLM": Run("0.32.0", "2026-11-26", "splits and copies of random models"),
            "MLX": Run("mlx-lm 0.32.2", "2026-11-26", "splits and copies of random models"),
            "transformers 4": Run("4.57.6", "2026-11-26", "splits and copies of random models"),
        },
        accepts=frozenset({Trait.QKV_BIAS, Trait.QK_NORM, Trait.PARTIAL_ROTARY, Trait.UNGATED}),
        groups=True,
        shared_in_experts=True,
        min_experts=2,  # it scores groups of experts by their best two
    ),
)
