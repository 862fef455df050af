"""Laguna: a norm per head on q and k, a shared expert of any size, any layer dense, windows on any.

Its attention has a gate, softplus(g x) for each head. A gate of zeros lets ln 2 through, which
o_proj makes good. (In bfloat16 the class rounds ln 2 by a quarter of a percent, as it may round any
weight.)

A window of 0, as a source without windows has here, is none to transformers and llama.cpp; vLLM
0.32 makes it null, which transformers' config refuses.

Sigmoid scores are always renormalised, and what the experts put out together is multiplied by
`moe_routed_scaling_factor`: to use another top_k, change it too.
"""

import math
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
    attention_bias,
    per_expert,
    separate,
    shared_or_silent,
    with_gain,
)
from upcycle.models.targets.limits import (
    first_dense_only,
    no_biases,
    no_dynamic_rope,
    no_output_bias,
    no_window,
    silu_only,
    unknown,
    window_needed,
)
from upcycle.models.traits import Architecture, Trait

SILENT = 8  # neurons, all zero, of the shared expert of a layer that has none


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    geometry, layers = spec.geometry, range(arch.num_layers)
    kinds = arch.fields["layer_types"]
    rope = {"partial_rotary_factor": 1.0} | arch.fields["rope_parameters"]
    return {
        "architectures": ["LagunaForCausalLM"],
        "intermediate_size": arch.intermediate_size,
        "moe_intermediate_size": geometry.expert_size,
        "shared_expert_intermediate_size": geometry.shared_size or SILENT,
        "num_experts": geometry.num_experts,
        "num_experts_per_tok": geometry.top_k,
        "moe_routed_scaling_factor": float(spec.gains.scale),
        "mlp_layer_types": ["dense" if i in spec.dense_layers else "sparse" for i in layers],
        "num_attention_heads_per_layer": [arch.fields["num_attention_heads"]] * len(layers),
        "gating": True,
        "attention_bias": attention_bias(arch),
        "layer_types": kinds,
        "sliding_window": arch.sliding_window or 0,
        "rope_parameters": dict.fromkeys(sorted(set(kinds)), rope),
    }


def experts(layer: MoELayer, gains: Gains) -> Named:
    yield from per_expert(layer, gains, router="mlp.gate.weight", prefix="mlp.experts.")
    bias_E = torch.zeros_like(layer.router_ED[:, 0], dtype=torch.float32)
    yield "mlp.experts.e_score_correction_bias", bias_E
    shared = with_gain(shared_or_silent(layer, SILENT), gains.shared)
    yield from separate("mlp.shared_expert.", shared, LLAMA_NAMES)


def extra(arch: Architecture, layer: Mapping[str, Tensor]) -> Named:
    """The attention's gate, and what makes it good."""
    heads = arch.fields["num_attention_heads"]
    yield (
        "self_attn.g_proj.weight",
        layer["self_attn.q_proj.weight"].new_zeros(heads, arch.hidden_size),
    )
    output = layer["self_attn.o_proj.weight"]
    yield "self_attn.o_proj.weight", (output.float() / math.log(2)).to(output.dtype)


TARGETS.add(
    "laguna",
    MoETarget(
        "laguna",
        routing=Routing("sigmoid", "always", shared_gate=1.0, scales=True),
        dense_layers="any",
        split_rank=8,
        copy_rank=8,
        config=config,
        experts=experts,
        runtimes={
            "llama.cpp": (silu_only, first_dense_only, no_output_bias, no_window),
            "vLLM": (silu_only, window_needed),
            "MLX": (silu_only, no_biases, no_window, no_dynamic_rope),
            "transformers 4": (unknown,),
        },
        ran={
            "llama.cpp": Run("0.5.0", "2026-11-29", "splits and copies of random models"),
            "MLX": Run("mlx-lm 0.32.2", "2026-11-29", "splits and copies of random models"),
        },
        accepts=frozenset(
            {
                *(Trait.QKV_BIAS, Trait.O_BIAS, Trait.PARTIAL_ROTARY),
                *(Trait.SLIDING_WINDOW, Trait.MIXED_WINDOW),
            }
        ),
        requires=frozenset({Trait.QK_NORM}),
        extra=extra,
    ),
)
