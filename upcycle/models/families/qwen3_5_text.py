"""Qwen3.5's text model: gated DeltaNet in most layers, gated attention with a norm per head and a
partial rotary embedding in the others.

Norm weights are stored less one, as in the host. On the hub the checkpoints hold a vision tower and
a layer that drafts tokens, too.
"""

from typing import Any

from transformers import PreTrainedConfig

from upcycle.models.families.base import FAMILIES, Blocks, DenseFamily, Drafts
from upcycle.models.traits import Trait

READ_ELSEWHERE = (
    *("attn_output_gate", "mamba_ssm_dtype"),
    *("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),
)
"""Fields that transformers 5 does not read, as they hold of every such model, but others do."""


def extra(config: PreTrainedConfig) -> dict[str, Any]:
    found = {n: getattr(config, n) for n in READ_ELSEWHERE if hasattr(config, n)}
    kinds = list(config.layer_types)
    if "full_attention" not in kinds:
        return found
    interval = kinds.index("full_attention") + 1
    if kinds == [kinds[i % interval] for i in range(len(kinds))]:
        found["full_attention_interval"] = interval
    return found


FAMILIES.add(
    "qwen3_5_text",
    DenseFamily(
        "qwen3_5_text",
        always={Trait.DELTA_NET: "qwen3_5 always has them"},
        extra=extra,
        partial_rotary=True,
        carried=(
            "linear_conv_kernel_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
        ),
        drafts=Drafts("mtp.", "mtp_num_hidden_layers"),
        blocks=Blocks(mixers=("self_attn", "linear_attn")),
    ),
)
