"""Random split: the control that every other split must beat.

LLaMA-MoE's released models use it (Independent-Random), arXiv:2406.16554.
"""

import torch
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.core.types import DenseFFN
from upcycle.split.base import split_from_weights


@split_from_weights("random", summary="a random partition of the neurons", paper="arXiv:2406.16554")
def split(ffn: DenseFFN, num_experts: int, params: Params, rng: torch.Generator) -> Tensor:
    return torch.randperm(ffn.num_neurons, generator=rng).view(num_experts, -1).sort(1).values
