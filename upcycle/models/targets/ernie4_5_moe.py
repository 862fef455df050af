"""ERNIE 4.5 MoE: softmax scores, always renormalised, an ungated shared expert, and a rotary
embedding of neighbouring channels.

Its config declares no head_dim, but its attention takes the one that config.json has, so heads need
not fill the hidden size (those of ERNIE-4.5-0.3B do not). Biases added to the scores for selection
are kept beside the router.
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
    moe_range,
    per_expert,
    separate,
    with_gain,
)
from upcycle.models.targets.limits import first_dense_only, silu_only, unscaled_rope
from upcycle.models.traits import Architecture, Trait


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    geometry = spec.geometry
    routed = moe_range(spec.dense_layers, arch.num_layers)
    assert routed is not None  # the target would have been refused
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "intermediate_size": arch.intermediate_size,
        "moe_intermediate_size": geometry.expert_size,
        "moe_num_experts": geometry.num_experts,
        "moe_num_shared_experts": geometry.shared_size // geometry.expert_size,
        "moe_k": geometry.top_k,
        "moe_layer_start_index": routed[0],
        "moe_layer_end_index": routed[-1],
        "moe_layer_interval": routed.step,
        "use_bias": False,
    }


def experts(layer: MoELayer, gains: Gains) -> Named:
    yield from per_expert(layer, gains, router="mlp.gate.weight", prefix="mlp.experts.")
    bias_1E = torch.zeros_like(layer.router_ED[None, :, 0], dtype=torch.float32)
    yield "mlp.moe_statics.e_score_correction_bias", bias_1E
    if layer.shared is not None:
        shared = with_gain(layer.shared, gains.shared)
        yield from separate("mlp.shared_experts.", shared, LLAMA_NAMES)


def shared_by_heads(arch: Architecture, spec: MoESpec) -> str:
    """llama.cpp's converter works the shared expert's width out of what it is in Baidu's models."""
    width = arch.intermediate_size // arch.fields["num_key_value_heads"]
    if spec.geometry.shared_size in (0, width):
        return ""
    share = width / arch.intermediate_size
    return f"the shared expert must have {width} neurons (`shared={share:g}`) or none (`shared=0`)"


TARGETS.add(
    "ernie4_5_moe",
    MoETarget(
        "ernie4_5_moe",
        routing=Routing("softmax", "always", shared_gate=1.0),
        dense_layers="ends",
        split_rank=6,
        copy_rank=6,
        config=config,
        experts=experts,
        runtimes={
            "llama.cpp": (silu_only, first_dense_only, shared_by_heads),
            "vLLM": (silu_only,),
            "MLX": (silu_only, unscaled_rope),
            "transformers 4": (),
        },
        ran={
            "llama.cpp": Run("0.5.0", "2026-11-29", "splits and copies of random models"),
            "vLLM": Run("0.32.0", "2026-11-29", "a split of a random model"),
            "MLX": Run("mlx-lm 0.32.2", "2026-11-29", "splits and copies of random models"),
        },
        requires=frozenset({Trait.INTERLEAVED_ROTARY}),
        shared_in_experts=True,
    ),
)
