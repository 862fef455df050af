"""What llama.cpp's converter did to the tensors of several families, undone.

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


def from_mamba(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """The logarithm of what decays, in place of which it stores the rate."""
    return (-tensor).log() if name.endswith(".ssm_a") else tensor
