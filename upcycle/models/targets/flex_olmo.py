"""FlexOlmo: softmax with optional renormalisation in OLMo 2's block."""

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
from upcycle.models.targets.limits import silu_only, unknown, usual_yarn
from upcycle.models.traits import Architecture, Trait


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    return {
        "architectures": ["FlexOlmoForCausalLM"],
        "intermediate_size": spec.geometry.expert_size,
        "num_experts": spec.geometry.num_experts,
        "num_experts_per_tok": spec.geometry.top_k,
        "norm_topk_prob": spec.gains.norm_topk_prob,
        "attention_bias": attention_bias(arch),
    }


TARGETS.add(
    "flex_olmo",
    MoETarget(
        "flex_olmo",
        routing=Routing("softmax", "optional", shared_gate=None),
        dense_layers="none",
        split_rank=4,
        copy_rank=5,
        config=config,
        experts=partial(per_expert, router="mlp.gate.weight", prefix="mlp.experts."),
        runtimes={
            "llama.cpp": (unknown,),
            "vLLM": (silu_only, usual_yarn),
            "MLX": (unknown,),
            "transformers 4": (),
        },
        ran={
            "vLLM": Run("0.32.0", "2026-11-26", "splits and copies of random models"),
            "transformers 4": Run("4.57.6", "2026-11-26", "splits and copies of random models"),
        },
        accepts=frozenset({Trait.QKV_BIAS, Trait.O_BIAS}),
        requires=frozenset({Trait.POST_NORM, Trait.QK_NORM_FULL}),
    ),
)
