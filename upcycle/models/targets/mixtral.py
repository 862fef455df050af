"""Mixtral: top-k of softmax, always renormalised; the simplest home for copies."""

from functools import partial
from typing import Any

from upcycle.models.runtimes import Run
from upcycle.models.targets.base import TARGETS, MoESpec, MoETarget, Routing, per_expert
from upcycle.models.targets.limits import (
    heads_fill_hidden,
    no_window,
    silu_only,
    unscaled_rope,
    usual_yarn,
)
from upcycle.models.traits import Architecture, Trait


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": spec.geometry.expert_size,
        "num_local_experts": spec.geometry.num_experts,
        "num_experts_per_tok": spec.geometry.top_k,
        "sliding_window": arch.sliding_window,
        "router_jitter_noise": 0.0,
    }


TARGETS.add(
    "mixtral",
    MoETarget(
        "mixtral",
        routing=Routing("softmax", "always", shared_gate=None),
        dense_layers="none",
        split_rank=5,
        copy_rank=0,
        config=config,
        experts=partial(
            per_expert,
            router="block_sparse_moe.gate.weight",
            prefix="block_sparse_moe.experts.",
            names=("w1", "w3", "w2"),
        ),
        runtimes={
            "llama.cpp": (silu_only, no_window, usual_yarn),
            "vLLM": (silu_only, usual_yarn),
            "MLX": (silu_only, no_window, heads_fill_hidden, unscaled_rope),
            "transformers 4": (),
        },
        ran={
            "llama.cpp": Run("0.5.0", "2026-11-29", "copies of SmolLM2-135M"),
            "vLLM": Run("0.32.0", "2026-11-26", "splits and copies of random models"),
            "MLX": Run("mlx-lm 0.32.2", "2026-11-26", "splits and copies of random models"),
            "transformers 4": Run("4.57.6", "2026-11-26", "splits and copies of random models"),
        },
        accepts=frozenset({Trait.SLIDING_WINDOW, Trait.UNGATED}),
    ),
)
