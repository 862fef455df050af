"""Contiguous split: neurons in the order in which they stand.

FactorLLM slices the FFN this way, arXiv:2408.11855.
"""

import torch
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.core.types import DenseFFN
from upcycle.split.base import split_from_weights


@split_from_weights(
    "contiguous", summary="equal slices in the neurons' own order", paper="arXiv:2408.11855"
)
def split(ffn: DenseFFN, num_experts: int, params: Params, rng: torch.Generator) -> Tensor:
    return torch.arange(ffn.num_neurons).view(num_experts, -1)
