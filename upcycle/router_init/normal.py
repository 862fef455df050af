"""Normal: zero-mean random rows, for copies that are going to be trained.

Sparse upcycling, arXiv:2212.05055.
"""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.core.types import DenseFFN
from upcycle.router_init.base import router_from_weights


class NormalParams(Params):
    std: PositiveFloat = 0.02


@router_from_weights(
    "normal",
    summary="random rows, N(0, std)",
    paper="arXiv:2212.05055",
    params=NormalParams,
    tells_copies_apart=True,
)
def router(ffn: DenseFFN, experts_EM: Tensor, params: NormalParams, rng: torch.Generator) -> Tensor:
    return torch.randn(len(experts_EM), ffn.hidden_size, generator=rng) * params.std
