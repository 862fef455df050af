"""LFM2, where a layer without heads of keys is a convolution."""

from upcycle.models.gguf.architectures.base import STORED, Stored
from upcycle.models.gguf.fields import FULL, Fields, has_in_a_layer, shape_fields
from upcycle.models.gguf.file import GgufFile
from upcycle.models.gguf.metadata import Metadata
from upcycle.models.gguf.rope import rope_fields


def fields(file: GgufFile, meta: Metadata) -> Fields:
    shape = shape_fields(file, meta)
    kv_heads = meta.per_layer("attention.head_count_kv", shape["num_hidden_layers"])
    own = {
        "intermediate_size": meta.number("feed_forward_length"),
        "block_auto_adjust_ff_dim": False,  # the width is what it was made
        "num_key_value_heads": max(kv_heads),
        "layer_types": [FULL if count else "conv" for count in kv_heads],
        "norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": meta.number("shortconv.l_cache"),
        "conv_bias": has_in_a_layer(file, "shortconv.in_proj.bias"),
    }
    return shape | own | rope_fields(file, meta, shape)


STORED.add("lfm2", Stored("lfm2", fields))
