"""T5 (v1.0): an encoder, a decoder that looks at it, and FFNs of relu without a gate.

Attention has learned biases by distance in place of positions, and no scale. Where `config.json`
ties the embeddings, logits are divided by the root of d_model; transformers ties them whatever it
says, unless a checkpoint holds two. T5 1.1, Flan-T5 and later ones have gates, and no host.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig

from upcycle.core.errors import UpcycleError
from upcycle.models.families.base import (
    ANY,
    FAMILIES,
    Blocks,
    DenseFamily,
    Stack,
    unsupported_reason,
)
from upcycle.models.traits import Trait

FFN = re.compile(r"layer\.\d\.DenseReluDense\.w([io])\.")
LLAMA = {"i": "mlp.up_proj.", "o": "mlp.down_proj."}
PASSED_ON = ("decoder_start_token_id", "n_positions", "task_specific_params")
"""Fields that the class does not declare, but that say how to write with the model."""


def rewrite(name: str, tensor: Tensor, config: PreTrainedConfig) -> Mapping[str, Tensor]:
    return {FFN.sub(lambda found: LLAMA[found[1]], name): tensor}


def extra(config: PreTrainedConfig) -> dict[str, Any]:
    layers = config.num_layers + config.num_decoder_layers
    named = {n: getattr(config, n) for n in PASSED_ON if hasattr(config, n)}
    return named | {
        "num_hidden_layers": layers,
        "num_key_value_heads": config.num_heads,
        "layer_types": ["full_attention"] * layers,
        "hidden_act": config.dense_act_fn,
        "logits_scaling": config.d_model**0.5 if config.scale_decoder_outputs else 1.0,
    }


def traits(config: PreTrainedConfig) -> dict[Trait, str]:
    """Raises:
    UpcycleError: its FFNs have gates, or nothing says what its decoder begins with.
    """
    if config.is_gated_act:
        raise UpcycleError(unsupported_reason("t5", encoder_decoder=True, gated=True))
    if getattr(config, "decoder_start_token_id", None) is None and config.pad_token_id is None:
        raise UpcycleError(
            "config.json of this t5 has neither a decoder_start_token_id nor a pad_token_id, so "
            "what its decoder begins with is not clear: set the one that it was trained with"
        )
    return {}


FAMILIES.add(
    "t5",
    DenseFamily(
        "t5",
        always={
            Trait.ENCODER: "t5 always has one",
            Trait.RELATIVE_POSITIONS: "t5 always has them",
            Trait.UNGATED: "feed_forward_proj names no gate",
        },
        inert={"classifier_dropout": ANY},
        carried=(
            *("d_kv", "num_heads", "num_layers", "num_decoder_layers", "layer_norm_epsilon"),
            *("relative_attention_num_buckets", "relative_attention_max_distance"),
            *("dropout_rate", "initializer_factor"),
        ),
        understood=frozenset({"d_model", "d_ff", "feed_forward_proj"}),
        extra=extra,
        traits=traits,
        width=lambda config: int(config.d_ff),
        blocks=Blocks(
            norm="final_layer_norm",
            mixers=("layer.0.SelfAttention", "layer.1.EncDecAttention"),
            ffn="DenseReluDense",
            handed_on=("position_bias", "encoder_decoder_position_bias"),
        ),
        stacks=(
            Stack("encoder", "block", "num_layers", ffn="layer.1."),
            Stack("decoder", "block", "num_decoder_layers", ffn="layer.2."),
        ),
        unread=re.compile(r"EncDecAttention\.relative_attention_bias\.weight$"),
        rewrite=rewrite,
        auto=AutoModelForSeq2SeqLM,
    ),
)
