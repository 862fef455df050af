"""Random: rows of the size that hidden states have, as mergekit's gate mode of this name.

Their logits are large, so one expert gets nearly all of a token's weight.
"""

import torch
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.core.types import DenseFFN
from upcycle.router_init.base import router_from_weights


@router_from_weights(
    "random", summary="random rows, N(0, 1)", paper="baseline", tells_copies_apart=True
)
def router(ffn: DenseFFN, experts_EM: Tensor, params: Params, rng: torch.Generator) -> Tensor:
    return torch.randn(len(experts_EM), ffn.hidden_size, generator=rng)
