"""Gemma 4's text model: norms around attention and FFN, a norm without weights on v, a rotary base
and a size of heads for each kind of layer, layers that are scaled and that share keys and values.

On the hub the checkpoints hold vision and audio towers, too. The smaller models also add an
embedding per layer after the FFN, of which each token has its own.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig

from upcycle.core.errors import UpcycleError
from upcycle.models.families.base import ANY, FAMILIES, Blocks, DenseFamily
from upcycle.models.traits import Trait


def extra(config: PreTrainedConfig) -> dict[str, Any]:
    if config.use_double_wide_mlp and config.num_kv_shared_layers:
        raise UpcycleError(
            "config.json sets use_double_wide_mlp=true, so that layers that share keys and values "
            "have FFNs twice as wide as the others, and no native MoE has experts of two widths"
        )
    if config.use_bidirectional_attention == "all":
        raise UpcycleError(
            "config.json sets use_bidirectional_attention='all', so that tokens see what follows "
            "them, and upcycle converts decoders alone"
        )
    return {
        "hidden_act": config.hidden_activation,
        "layer_types": list(config.layer_types),
        **_heads(config),
    }


def _heads(config: PreTrainedConfig) -> dict[str, Any]:
    """The sizes of heads, of which layers of full attention have their own, as the published
    config.json has them."""
    sizes: dict[str, set[tuple[int, ...]]] = {}
    for layer, kind in zip(config.per_layer_config, config.layer_types, strict=True):
        sizes.setdefault(kind, set()).add((layer.head_dim, layer.num_key_value_heads))
    if any(len(of_kind) > 1 for of_kind in sizes.values()):
        raise UpcycleError(
            "config.json has a per_layer_config in which layers of one kind differ, which has no "
            "home in any target"
        )
    ((full_dim, full_heads),) = sizes["full_attention"]
    ((head_dim, heads),) = sizes.get("sliding_attention", sizes["full_attention"])
    return {
        "head_dim": head_dim,
        "num_key_value_heads": heads,
        "global_head_dim": full_dim,
        "num_global_key_value_heads": full_heads,
    }


FAMILIES.add(
    "gemma4_text",
    DenseFamily(
        "gemma4_text",
        always={
            Trait.GEMMA4: "gemma4 always has them",
            Trait.POST_NORM: "gemma4 always has them",
        },
        extra=extra,
        # The first two are read above, the others act in the MoE block alone.
        inert=dict.fromkeys(
            (
                *("hidden_activation", "use_double_wide_mlp"),
                *("num_experts", "top_k_experts", "moe_intermediate_size"),
            ),
            ANY,
        ),
        carried=(
            "attention_k_eq_v",
            "final_logit_softcapping",
            "hidden_size_per_layer_input",
            "num_kv_shared_layers",
            "use_bidirectional_attention",
            "vocab_size_per_layer_input",
        ),
        routed=lambda config: bool(config.enable_moe_block),
        blocks=Blocks(
            embeddings=(
                "embed_tokens",
                "embed_tokens_per_layer",
                "per_layer_model_projection",
                "per_layer_projection_norm",
            ),
            after={"hidden_size_per_layer_input": 0, "layer_scalar": torch.tensor(1.0)},
        ),
    ),
)
