"""Rotary embeddings that pair channels 0 and 1, 2 and 3, … of a head, where llama pairs each one
of the first half with one of the second: the same function of q and k whose rows change places."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.models.families.base import head_dim

QUERY_OR_KEY = re.compile(r"\.[qk]_proj\.(weight|bias)$")


def paired_as_llama(name: str, tensor: Tensor, config: PreTrainedConfig) -> Mapping[str, Tensor]:
    """A family's `rewrite`: the rows of q and k in the order in which llama pairs them."""
    if not QUERY_OR_KEY.search(name):
        return {name: tensor}
    size = head_dim(config)
    angles = len(range(0, int(size * config.rope_parameters.get("partial_rotary_factor", 1.0)), 2))
    order_H = torch.arange(size)
    order_H[: 2 * angles] = order_H[: 2 * angles].view(angles, 2).T.flatten()
    return {name: tensor.unflatten(0, (-1, size))[:, order_H].flatten(0, 1)}
