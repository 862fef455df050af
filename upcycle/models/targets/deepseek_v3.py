"""DeepSeek-V3: keys and values made from a latent (MLA), and experts as in glm4_moe: sigmoid scores
times a factor, experts in groups, an ungated shared expert, the first layers dense.

`scoring_func` and `topk_method` are in the config for other runtimes, some of which take softmax or
no selection bias where these are missing; transformers' class knows no other way.
"""

from typing import Any

from upcycle.models.runtimes import Run
from upcycle.models.targets.base import (
    TARGETS,
    MoESpec,
    MoETarget,
    Routing,
    attention_bias,
    copy_groups,
)
from upcycle.models.targets.glm4_moe import experts
from upcycle.models.targets.limits import (
    interleaved,
    no_biases,
    shared_needed,
    silu_only,
    untied,
)
from upcycle.models.traits import Architecture, Trait

LITE = (26, 27)
"""Numbers of layers by which llama.cpp knows models whose queries are made from no latent."""


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    geometry = spec.geometry
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "intermediate_size": arch.intermediate_size,
        "moe_intermediate_size": geometry.expert_size,
        "n_routed_experts": geometry.num_experts,
        "n_shared_experts": geometry.shared_size // geometry.expert_size,
        "num_experts_per_tok": geometry.top_k,
        "norm_topk_prob": spec.gains.norm_topk_prob,
        "routed_scaling_factor": spec.gains.scale,
        **copy_groups(geometry),
        "first_k_dense_replace": len(spec.dense_layers),
        "num_nextn_predict_layers": 0,
        "attention_bias": attention_bias(arch),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


def queries_by_layers(arch: Architecture, spec: MoESpec) -> str:
    """Queries are made from a latent, but of models that have as many layers as its small ones."""
    latent = arch.fields.get("q_lora_rank") is not None
    if latent != (arch.num_layers in LITE):
        return ""
    made = "must not be" if latent else "must be"
    return f"in a model of {arch.num_layers} layers queries {made} made from a latent"


TARGETS.add(
    "deepseek_v3",
    MoETarget(
        "deepseek_v3",
        routing=Routing("sigmoid", "optional", shared_gate=1.0, scales=True),
        dense_layers="prefix",
        split_rank=7,
        copy_rank=7,
        config=config,
        experts=experts,
        runtimes={
            "llama.cpp": (silu_only, shared_needed, no_biases, interleaved, queries_by_layers),
            "vLLM": (silu_only, shared_needed, no_biases, interleaved),
            "MLX": (silu_only, shared_needed, untied, interleaved),
            "transformers 4": (),
        },
        ran={
            "llama.cpp": Run("0.5.0", "2026-11-29", "a split of a random model"),
            "MLX": Run("mlx-lm 0.32.2", "2026-11-29", "a split of a random model"),
        },
        accepts=frozenset({Trait.QKV_BIAS, Trait.O_BIAS}),
        requires=frozenset({Trait.LATENT_ATTENTION}),
        groups=True,
        shared_in_experts=True,
        min_experts=2,  # it scores groups of experts by their best two
    ),
)
