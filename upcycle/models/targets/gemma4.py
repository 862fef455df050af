"""Gemma 4 with its MoE block: softmax of the selected, always renormalised, times a scale for each
expert; every layer sparse.

The class has a dense FFN beside the experts, each with norms of its own, and one norm over their
sum. That FFN is silent here: what is always on would have to pass another norm than the experts.
The experts' own norm has weights of one, so that the norm over the sum finds what is normalised
already: it is the dense model's but for the norms' epsilon. The gain is the experts' scale.

The router sees the residual stream, normalised without weights, times `scale` and the inverse root
of its width. With the weights of the norm before the FFN, times that root, as its scale, it sees
what the FFN sees.
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
    Whole,
    attention_bias,
    fused,
    separate,
    shared_or_silent,
)
from upcycle.models.targets.limits import gelu_only, no_biases, unknown
from upcycle.models.traits import Architecture, Trait

SILENT = 8  # neurons, all zero, of the dense FFN


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    fields = arch.fields
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "enable_moe_block": True,
        "intermediate_size": SILENT,
        "moe_intermediate_size": spec.geometry.expert_size,
        "num_experts": spec.geometry.num_experts,
        "top_k_experts": spec.geometry.top_k,
        "use_double_wide_mlp": False,
        "attention_bias": attention_bias(arch),
        "hidden_activation": fields["hidden_act"],
        "sliding_window": fields["sliding_window"],
        "layer_types": fields["layer_types"],
    }


def experts(layer: MoELayer, gains: Gains) -> Named:
    yield "router.proj.weight", layer.router_ED
    yield "router.per_expert_scale", torch.full_like(layer.router_ED[:, 0], gains.scale)
    yield from fused(layer, gains, "experts.")
    yield from separate("mlp.", shared_or_silent(layer, SILENT), LLAMA_NAMES)


def extra(arch: Architecture, layer: Mapping[str, Tensor]) -> Named:
    """The norms that the dense model does not have, and the router's scale."""
    before = layer["pre_feedforward_layernorm.weight"]
    yield "pre_feedforward_layernorm_2.weight", before
    yield "post_feedforward_layernorm_1.weight", torch.ones_like(before)
    yield "post_feedforward_layernorm_2.weight", torch.ones_like(before)
    yield "router.scale", (before.float() * arch.hidden_size**0.5).to(before.dtype)


TARGETS.add(
    "gemma4",
    MoETarget(
        "gemma4",
        model_type="gemma4_text",
        routing=Routing("softmax", "always", shared_gate=None, scales=True),
        dense_layers="none",
        split_rank=6,
        copy_rank=7,
        config=config,
        experts=experts,
        runtimes={
            "llama.cpp": (gelu_only, no_biases),
            "vLLM": (gelu_only, no_biases),
            "MLX": (gelu_only, no_biases),
            "transformers 4": (unknown,),
        },
        ran={
            "llama.cpp": Run("0.5.0", "2026-11-29", "splits and copies of random models"),
            "vLLM": Run("0.32.0", "2026-11-29", "a split of a random text model"),
            "MLX": Run("mlx-lm 0.32.2", "2026-11-29", "a split of a random text model"),
        },
        accepts=frozenset({Trait.QKV_BIAS, Trait.O_BIAS, Trait.SLIDING_WINDOW, Trait.MIXED_WINDOW}),
        requires=frozenset({Trait.GEMMA4, Trait.POST_NORM}),
        extra=extra,
        whole=Whole("gemma4", "Gemma4ForConditionalGeneration"),
        lora=("experts.gate_up_proj", "experts.down_proj"),
        router="router.proj.weight",
        linear_router="router",
    ),
)
