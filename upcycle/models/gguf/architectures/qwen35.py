"""Qwen3.5's text model, with the layers that draft tokens behind its own."""

import re

from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.models.gguf.architectures.base import STORED, Stored, with_time_step
from upcycle.models.gguf.fields import FULL, LINEAR, Fields, has_in_a_layer, shape_fields
from upcycle.models.gguf.file import GgufFile
from upcycle.models.gguf.metadata import Metadata
from upcycle.models.gguf.restored import from_mamba
from upcycle.models.gguf.rope import rope_fields


def fields(file: GgufFile, meta: Metadata) -> Fields:
    drafts = meta.take("nextn_predict_layers", 0)
    shape = shape_fields(file, meta)
    layers = shape["num_hidden_layers"] - drafts
    inner, heads = meta.number("ssm.inner_size"), meta.number("ssm.time_step_rank")
    own = {
        "num_hidden_layers": layers,
        "mtp_num_hidden_layers": drafts,
        "intermediate_size": meta.number("feed_forward_length"),
        "num_key_value_heads": meta.number("attention.head_count_kv"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "layer_types": _linear_layers(meta, layers, drafts),
        "attention_bias": has_in_a_layer(file, "attn_q.bias"),
        "linear_conv_kernel_dim": meta.number("ssm.conv_kernel"),
        "linear_key_head_dim": meta.number("ssm.state_size"),
        "linear_num_key_heads": meta.number("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": inner // heads,
    }
    # How positions in an image are told apart; in text, all axes have the same.
    sections = [size for size in meta.take("rope.dimension_sections", []) if size]
    found = shape | own | rope_fields(file, meta, shape, partial=True)
    if sections:
        found["rope_parameters"] |= {"mrope_section": sections, "mrope_interleaved": True}
    return found


def _linear_layers(meta: Metadata, layers: int, drafts: int) -> list[str]:
    interval = meta.number("full_attention_interval", 4)
    found = [bool((layer + 1) % interval) for layer in range(layers)]
    if "attention.recurrent_layers" in meta.rest:
        found = [bool(n) for n in meta.per_layer("attention.recurrent_layers", layers + drafts)]
    return [LINEAR if linear else FULL for linear in found[:layers]]


def beside(config: PreTrainedConfig) -> dict[str, str]:
    """The layers behind the model's, and what is around the first of them."""
    first = config.num_hidden_layers
    around = {
        "eh_proj": "fc",
        "enorm": "pre_fc_norm_embedding",
        "hnorm": "pre_fc_norm_hidden",
        "shared_head_norm": "norm",
    }
    found = {f"blk.{first}.nextn.{k}.weight": f"mtp.{v}.weight" for k, v in around.items()}
    return found | {
        f"blk.{first + layer}.{stored}.weight": f"mtp.layers.{layer}.{name}.weight"
        for layer in range(config.mtp_num_hidden_layers)
        for stored, name in ATTENTION_LAYER.items()
    }


ATTENTION_LAYER = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    **{f"attn_{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
"""Of a layer that drafts, too."""


def restored(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """Heads of values, which it takes from the groups that share a key in turn; their rates of
    decay; and norms but those of DeltaNet, to which it adds one."""
    part = re.sub(r"blk\.\d+\.", "", name)
    if part == "ssm_norm.weight":
        return tensor
    if part.endswith("norm.weight"):
        return tensor - 1
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    if part in ("attn_qkv.weight", "ssm_conv1d.weight"):
        first = 2 * keys * config.linear_key_head_dim
        tensor[first:] = _grouped(tensor[first:], keys, values)
    elif part in PER_VALUE:
        tensor = _grouped(tensor, keys, values)
    elif part == "ssm_out.weight":
        tensor = _grouped(tensor.T, keys, values).T
    return from_mamba(name, tensor, config)


PER_VALUE = ("attn_gate.weight", "ssm_alpha.weight", "ssm_beta.weight", "ssm_a", "ssm_dt.bias")
"""Rows are heads of values, or parts of these."""


def _grouped(tensor: Tensor, keys: int, values: int) -> Tensor:
    rows: Tensor = tensor.unflatten(0, (values // keys, keys, -1)).transpose(0, 1)
    return rows.reshape(tensor.shape)


STORED.add(
    "qwen35",
    Stored("qwen3_5_text", fields, spelled=with_time_step, restored=restored, beside=beside),
)
