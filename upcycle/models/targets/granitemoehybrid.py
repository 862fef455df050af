"""Granite 4 with experts: granitemoeshared's routing in Mamba and attention layers.

Its class always has a shared expert; where there is none, a few neurons put out nothing.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from upcycle.core.types import MoELayer
from upcycle.models.runtimes import Run
from upcycle.models.targets import granitemoeshared
from upcycle.models.targets.base import (
    TARGETS,
    Gains,
    MoESpec,
    MoETarget,
    Named,
    Routing,
    shared_or_silent,
)
from upcycle.models.targets.limits import heads_fill_hidden, silu_only, unscaled_rope
from upcycle.models.traits import Architecture, Trait

SILENT = 8  # neurons of the shared expert of a layer that has none
OLDER_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    return granitemoeshared.shared_fields(arch, spec) | {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "shared_intermediate_size": spec.geometry.shared_size or SILENT,
        "layer_types": arch.fields["layer_types"],
    }


def older(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 5 reads, too, but does not write: llama.cpp and mlx-lm know kinds of layers
    by these names, and mlx-lm rotates unless told not to."""
    kinds = [OLDER_KINDS[kind] for kind in config["layer_types"]]
    rotates = config.get("position_embedding_type") == "rope"
    return {"layer_types": kinds, "position_embedding_type": "rope" if rotates else "nope"}


def experts(layer: MoELayer, gains: Gains) -> Named:
    whole = replace(layer, shared=shared_or_silent(layer, SILENT))
    yield from granitemoeshared.experts(whole, gains)


def rotates_without_mamba(arch: Architecture, spec: MoESpec) -> str:
    """Attention has rotary embeddings where no layer is of Mamba, and only there."""
    rotates = arch.fields["position_embedding_type"] == "rope"
    mamba = "linear_attention" in arch.fields["layer_types"]
    if rotates and mamba:
        return "beside Mamba layers attention has no rotary embedding"
    return "" if rotates or mamba else "without Mamba layers attention has rotary embedding"


TARGETS.add(
    "granitemoehybrid",
    MoETarget(
        "granitemoehybrid",
        routing=Routing("softmax", "always", shared_gate=1.0),
        dense_layers="none",
        split_rank=7,
        copy_rank=7,
        config=config,
        older=older,
        experts=experts,
        runtimes={
            "llama.cpp": (silu_only, rotates_without_mamba),
            "vLLM": (silu_only, heads_fill_hidden),
            "MLX": (silu_only, heads_fill_hidden, unscaled_rope),
            "transformers 4": (heads_fill_hidden,),
        },
        ran={
            "llama.cpp": Run("0.5.0", "2026-11-29", "splits and copies of random models"),
            "vLLM": Run("0.32.0", "2026-11-29", "a split of a random model"),
            "MLX": Run("mlx-lm 0.32.2", "2026-11-29", "splits and copies of random models"),
        },
        accepts=granitemoeshared.MULTIPLIERS | {Trait.QKV_BIAS, Trait.O_BIAS},
        requires=frozenset({Trait.MAMBA}),
        lora=("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
        router="block_sparse_moe.router.weight",
    ),
)
