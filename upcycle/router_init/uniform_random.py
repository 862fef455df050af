"""Uniform random: rows as a linear layer begins with, as mergekit's gate mode of this name."""

import math

import torch
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.core.types import DenseFFN
from upcycle.router_init.base import router_from_weights


@router_from_weights(
    "uniform_random",
    summary="random rows, uniform within 1/√D of 0",
    paper="baseline",
    tells_copies_apart=True,
)
def router(ffn: DenseFFN, experts_EM: Tensor, params: Params, rng: torch.Generator) -> Tensor:
    rows_ED = torch.rand(len(experts_EM), ffn.hidden_size, generator=rng)
    return rows_ED.mul_(2).sub_(1).div_(math.sqrt(ffn.hidden_size))
