"""LFM2: gated short convolutions in most layers, attention with a norm per head in the others.

`block_auto_adjust_ff_dim` makes the FFN narrower than config.json says.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.models.families.base import FAMILIES, Blocks, DenseFamily
from upcycle.models.traits import Trait

NAMES = {
    "feed_forward.w1.": "mlp.gate_proj.",
    "feed_forward.w3.": "mlp.up_proj.",
    "feed_forward.w2.": "mlp.down_proj.",
    "operator_norm.": "input_layernorm.",
    "ffn_norm.": "post_attention_layernorm.",
    "self_attn.q_layernorm.": "self_attn.q_norm.",
    "self_attn.k_layernorm.": "self_attn.k_norm.",
    "self_attn.out_proj.": "self_attn.o_proj.",
    "model.embedding_norm.": "model.norm.",
}
"""What llama calls the parts of a layer, and the last norm."""
ITS_OWN = re.compile("|".join(rf"^{re.escape(name)}" for name in NAMES))


def rewrite(name: str, tensor: Tensor, config: PreTrainedConfig) -> Mapping[str, Tensor]:
    return {ITS_OWN.sub(lambda found: NAMES[found[0]], name): tensor}


def extra(config: PreTrainedConfig) -> dict[str, Any]:
    # The class knows no other activation.
    return {"rms_norm_eps": config.norm_eps, "hidden_act": "silu"}


def width(config: PreTrainedConfig) -> int:
    """Two thirds of what config.json says, times a factor, up to the next multiple."""
    if not config.block_auto_adjust_ff_dim:
        return int(config.intermediate_size)
    neurons, step = int(2 * config.intermediate_size / 3), int(config.block_multiple_of)
    if config.block_ffn_dim_multiplier is None:
        return neurons
    return math.ceil(int(config.block_ffn_dim_multiplier * neurons) / step) * step


FAMILIES.add(
    "lfm2",
    DenseFamily(
        "lfm2",
        always={
            Trait.CONVOLUTIONS: "lfm2 has them in most layers",
            Trait.QK_NORM: "lfm2 always has it",
        },
        carried=("conv_bias", "conv_L_cache"),
        # transformers makes layer_types of the list of layers with attention.
        understood=frozenset(
            {
                *("norm_eps", "full_attn_idxs", "block_auto_adjust_ff_dim"),
                *("block_ffn_dim_multiplier", "block_multiple_of"),
            }
        ),
        extra=extra,
        width=width,
        blocks=Blocks(norm="embedding_norm", mixers=("self_attn", "conv"), ffn="feed_forward"),
        rewrite=rewrite,
    ),
)
