"""Nemotron-H with experts: `moe` in place of `mlp` layers, any of which may stay; no gates.

Scores are sigmoids in float32, as glm4_moe's, whose groups and factor it has too, so that no weight
needs a gain. Its class always has a shared expert, of any width; where there is none, a few neurons
put out nothing.
"""

from collections.abc import Mapping
from typing import Any

import torch

from upcycle.core.types import DenseFFN, MoELayer
from upcycle.models.names import EMBEDDINGS
from upcycle.models.runtimes import Run
from upcycle.models.targets.base import (
    TARGETS,
    Gains,
    MoESpec,
    MoETarget,
    Named,
    Routing,
    copy_groups,
    shared_or_silent,
    with_gain,
    with_routed_gain,
)
from upcycle.models.targets.limits import all_layers_routed, unknown
from upcycle.models.traits import Architecture, Trait

SILENT = 8  # neurons of the shared expert of a layer that has none
LETTERS = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    routed = set(arch.ffn_layers) - set(spec.dense_layers)
    kinds = ["moe" if i in routed else k for i, k in enumerate(arch.fields["layer_types"])]
    return {
        "architectures": ["NemotronHForCausalLM"],
        "layers_block_type": kinds,
        "intermediate_size": arch.intermediate_size,
        "moe_intermediate_size": spec.geometry.expert_size,
        "moe_shared_expert_intermediate_size": spec.geometry.shared_size or SILENT,
        "n_routed_experts": spec.geometry.num_experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": spec.geometry.top_k,
        "norm_topk_prob": spec.gains.norm_topk_prob,
        "routed_scaling_factor": spec.gains.scale,
        "num_nextn_predict_layers": 0,
        # llama.cpp's converter takes it for that of Mamba layers; the FFNs' is mlp_hidden_act.
        "hidden_act": None,
        **copy_groups(spec.geometry),
    }


def older(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 5 works out, and others look for."""
    kinds = config["layers_block_type"]
    letters = "".join(LETTERS[kind] for kind in kinds)
    return {"hybrid_override_pattern": letters, "num_hidden_layers": len(kinds)}


def experts(layer: MoELayer, gains: Gains) -> Named:
    yield "mixer.gate.weight", layer.router_ED
    yield (
        "mixer.gate.e_score_correction_bias",
        torch.zeros_like(layer.router_ED[:, 0], dtype=torch.float32),
    )
    for e in range(layer.num_experts):
        yield from ungated(f"mixer.experts.{e}.", with_routed_gain(layer.expert(e), gains))
    shared = with_gain(shared_or_silent(layer, SILENT), gains.shared)
    yield from ungated("mixer.shared_experts.", shared)


def ungated(prefix: str, ffn: DenseFFN) -> Named:
    """The two matrices of an FFN without a gate."""
    yield f"{prefix}up_proj.weight", ffn.up_FD
    yield f"{prefix}down_proj.weight", ffn.down_DF


def squared_relu_only(arch: Architecture, spec: MoESpec) -> str:
    """Experts compute relu²."""
    act = arch.fields["hidden_act"]
    return "" if act == "relu2" else f"experts compute relu2, not {act}"


TARGETS.add(
    "nemotron_h",
    MoETarget(
        "nemotron_h",
        routing=Routing("sigmoid", "optional", shared_gate=1.0, scales=True),
        dense_layers="any",
        split_rank=8,
        copy_rank=8,
        config=config,
        older=older,
        experts=experts,
        runtimes={
            "llama.cpp": (squared_relu_only, all_layers_routed),
            "vLLM": (squared_relu_only,),
            "MLX": (squared_relu_only,),
            "transformers 4": (unknown,),
        },
        ran={
            "llama.cpp": Run("0.5.0", "2026-11-29", "splits and copies of random models"),
            "MLX": Run("mlx-lm 0.32.2", "2026-11-29", "splits and copies of random models"),
        },
        accepts=frozenset({Trait.UNSQUARED}),
        requires=frozenset({Trait.LONE_BLOCKS, Trait.UNGATED}),
        root="backbone.",
        spelled={
            EMBEDDINGS: "model.embeddings.weight",
            "mlp.up_proj.weight": "mixer.up_proj.weight",
            "mlp.down_proj.weight": "mixer.down_proj.weight",
        },
        min_experts=2,  # it scores groups of experts by their best two
        groups=True,
        lora=("mixer.experts.up_proj", "mixer.experts.down_proj"),
        router="mixer.gate.weight",
    ),
)
