"""Nemotron-H, each of whose layers says by its numbers what it is."""

import re

from upcycle.models.gguf.architectures.base import STORED, Stored, with_time_step
from upcycle.models.gguf.fields import FULL, LINEAR, Fields, has_in_a_layer, shape_fields
from upcycle.models.gguf.file import GgufFile
from upcycle.models.gguf.metadata import Metadata
from upcycle.models.gguf.restored import from_mamba


def fields(file: GgufFile, meta: Metadata) -> Fields:
    """As of granitehybrid; without a rotary embedding, whatever the keys of one say."""
    for key in ("rope.scaling.finetuned", "rope.dimension_count", "rope.freq_base"):
        meta.take(key)
    shape = shape_fields(file, meta)
    layers = shape["num_hidden_layers"]
    kv_heads = meta.per_layer("attention.head_count_kv", layers)
    widths = meta.per_layer("feed_forward_length", layers)
    inner, heads = meta.number("ssm.inner_size"), meta.number("ssm.time_step_rank")
    eps = meta.take("attention.layer_norm_rms_epsilon")
    own = {
        "layers_block_type": [
            "mlp" if width else FULL if count else LINEAR
            for width, count in zip(widths, kv_heads, strict=True)
        ],
        "intermediate_size": max(widths),
        "num_key_value_heads": max(kv_heads),
        "layer_norm_epsilon": meta.number("attention.layer_norm_epsilon", eps),
        "conv_kernel": meta.number("ssm.conv_kernel"),
        "ssm_state_size": meta.number("ssm.state_size"),
        "n_groups": meta.number("ssm.group_count"),
        "mamba_num_heads": heads,
        "mamba_head_dim": inner // heads,
        "use_conv_bias": has_in_a_layer(file, "ssm_conv1d.bias"),
        "use_bias": has_in_a_layer(file, "ssm_in.bias"),
        "mamba_proj_bias": has_in_a_layer(file, "ssm_in.bias"),
    }
    return shape | own


def spelled(name: str) -> tuple[str, ...]:
    return with_time_step(re.sub(r"^model\.", "backbone.", name))


STORED.add("nemotron_h", Stored("nemotron_h", fields, spelled=spelled, restored=from_mamba))
