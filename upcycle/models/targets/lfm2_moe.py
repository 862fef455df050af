"""LFM2-MoE: sigmoid scores in the model's own dtype, the first layers dense, no shared expert.

Below float32 scores near a half are a few steps apart, so that logits that spread by less tie
(`Routing.least_spread`). The copies of which shards are made are told apart where they tie by the
selection bias, which the class adds in float32.
"""

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
    per_expert,
)
from upcycle.models.targets.limits import (
    always_renormalises,
    heads_fill_hidden,
    unknown,
    unscaled_rope,
)
from upcycle.models.traits import Architecture, Trait

SPELLED = {
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "input_layernorm.weight": "operator_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_norm.weight": "self_attn.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attn.k_layernorm.weight",
    "self_attn.o_proj.weight": "self_attn.out_proj.weight",
    "model.norm.weight": "model.embedding_norm.weight",
}
TIE = 2.0**-22
"""By how much the selection bias prefers a copy to the one before it: less than scores below
float32 differ by, and seen in float32."""


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    return {
        "architectures": ["Lfm2MoeForCausalLM"],
        "intermediate_size": arch.intermediate_size,
        "moe_intermediate_size": spec.geometry.expert_size,
        "num_dense_layers": len(spec.dense_layers),
        "num_experts": spec.geometry.num_experts,
        "num_experts_per_tok": spec.geometry.top_k,
        "norm_topk_prob": spec.gains.norm_topk_prob,
        "routed_scaling_factor": spec.gains.scale,
        "use_expert_bias": True,
        "norm_eps": arch.fields["rms_norm_eps"],
        "layer_types": arch.fields["layer_types"],
    }


def experts(layer: MoELayer, gains: Gains) -> Named:
    yield from per_expert(
        layer,
        gains,
        router="feed_forward.gate.weight",
        prefix="feed_forward.experts.",
        names=("w1", "w3", "w2"),
    )
    yield "feed_forward.expert_bias", selection_bias(layer)


def selection_bias(layer: MoELayer) -> Tensor:
    """[E] in float32: the same for the shards of a copy, another for each copy."""
    bias_E = torch.zeros_like(layer.router_ED[:, 0], dtype=torch.float32)
    if layer.granularity == 1:
        return bias_E
    copies_E = torch.arange(layer.num_experts, device=bias_E.device) // layer.granularity
    return bias_E - TIE * copies_E


def no_conv_bias(arch: Architecture, spec: MoESpec) -> str:
    """Convolutions have no biases."""
    return "convolutions have no biases" if arch.fields.get("conv_bias") else ""


def tied(arch: Architecture, spec: MoESpec) -> str:
    """Output embeddings are those of the input."""
    return "" if arch.tied else "output embeddings must be those of the input"


TARGETS.add(
    "lfm2_moe",
    MoETarget(
        "lfm2_moe",
        # As llama.cpp does whatever the config says; it knows no routed_scaling_factor either.
        routing=Routing("sigmoid", "usually", shared_gate=None, in_model_dtype=True),
        dense_layers="prefix",
        split_rank=6,
        copy_rank=6,
        config=config,
        experts=experts,
        runtimes={
            "llama.cpp": (always_renormalises, no_conv_bias),
            "vLLM": (heads_fill_hidden, tied),
            "MLX": (heads_fill_hidden, tied, unscaled_rope),
            "transformers 4": (unknown,),
        },
        ran={
            "llama.cpp": Run("0.5.0", "2026-11-29", "splits and copies of random models"),
            "vLLM": Run(
                "0.32.0",
                "2026-11-29",
                "copies of a random model, once the rotary embedding of its build for CPUs was "
                "mended ([how](../dev/log.md#in-other-runtimes))",
            ),
            "MLX": Run("mlx-lm 0.32.2", "2026-11-29", "splits and copies of random models"),
        },
        requires=frozenset({Trait.CONVOLUTIONS, Trait.QK_NORM}),
        spelled=SPELLED,
        groups=True,
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        lora=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
        router="feed_forward.gate.weight",
    ),
)
