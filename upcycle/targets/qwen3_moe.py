"""Qwen3-MoE: softmax with optional renormalisation, any layer dense, a norm per head on q and k."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from upcycle.architecture import Architecture, Trait
from upcycle.targets.base import (
    TARGETS,
    MoESpec,
    MoETarget,
    Routing,
    all_layers_routed,
    attention_bias,
    llama_block,
    mlx_block,
    per_expert,
    silu_experts,
)


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "intermediate_size": arch.intermediate_size,
        "moe_intermediate_size": spec.expert_size,
        "num_experts": spec.geometry.routed_experts,
        "num_experts_per_tok": spec.geometry.top_k,
        "norm_topk_prob": spec.gains.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(spec.dense_layers),
        "attention_bias": attention_bias(arch),
        "use_sliding_window": arch.sliding_window is not None,
        "sliding_window": arch.sliding_window,
    }


def llama_cpp(arch: Architecture, spec: MoESpec) -> Iterator[str]:
    yield from all_layers_routed(spec)
    if not spec.gains.norm_topk_prob:
        yield "weights of experts are renormalised"
    yield from llama_block(arch, spec)


def mlx(arch: Architecture, spec: MoESpec) -> Iterator[str]:
    if attention_bias(arch):
        yield "attention has no biases"
    yield from mlx_block(arch, spec)


def vllm(arch: Architecture, spec: MoESpec) -> Iterator[str]:
    yield from silu_experts(arch, spec)
    if Trait.O_BIAS in arch.traits:
        yield "attention has no bias on its output"


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
        runtimes={"llama.cpp": llama_cpp, "vLLM": vllm, "MLX": mlx},
        accepts=frozenset({Trait.QKV_BIAS, Trait.O_BIAS, Trait.SLIDING_WINDOW}),
        requires=frozenset({Trait.QK_NORM}),
    ),
)
