"""Mixtral: top-k of softmax, always renormalised; the simplest home for copies."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from upcycle.architecture import Architecture, Trait
from upcycle.targets.base import (
    TARGETS,
    MoESpec,
    MoETarget,
    Routing,
    heads_fill_hidden,
    llama_block,
    mlx_block,
    per_expert,
    silu_experts,
)


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": spec.expert_size,
        "num_local_experts": spec.geometry.routed_experts,
        "num_experts_per_tok": spec.geometry.top_k,
        "sliding_window": arch.sliding_window,
        "router_jitter_noise": 0.0,
    }


def mlx(arch: Architecture, spec: MoESpec) -> Iterator[str]:
    yield from heads_fill_hidden(arch)
    yield from mlx_block(arch, spec)


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
        runtimes={"llama.cpp": llama_block, "vLLM": silu_experts, "MLX": mlx},
        accepts=frozenset({Trait.SLIDING_WINDOW}),
    ),
)
