"""What llama.cpp's converter did to a family's tensors, undone.

Each function takes a tensor's name in the file, its values, and the config.
"""

import re

from torch import Tensor
from transformers import PreTrainedConfig

QUERY_OR_KEY = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")


def as_they_are(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    return tensor


def from_halves(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """The rows of q and k, which it takes from the two halves of each head in turn."""
    match = QUERY_OR_KEY.fullmatch(name)
    if match is None:
        return tensor
    heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
    in_order: Tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
    return in_order


def from_gemma(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """Weights of norms, to which it adds one."""
    return tensor - 1 if name.endswith("norm.weight") else tensor


def from_mamba(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """The logarithm of what decays, in place of which it stores the rate."""
    return (-tensor).log() if name.endswith(".ssm_a") else tensor


def from_hybrid(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    return from_halves(name, from_mamba(name, tensor, config), config)


def from_qwen3_5(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
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
