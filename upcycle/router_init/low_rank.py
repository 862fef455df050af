"""Low rank: logits that pass through a few directions of the hidden state.

"Secret mixtures of experts inside your LLM", arXiv:2512.18452, routes through a bottleneck,
logits = B (A x) with r rows in A. Here the rows are `ridge`'s, W, cut down to rank r so that the
logits change least on the calibration tokens, Σ_t |W x - B A x|²: with W xᵀx Wᵀ = U Λ Uᵀ, B is the
r columns of U of the largest Λ, and A = Bᵀ W. A native router is one matrix, so the product is
written.

Departure: the paper trains both factors from scratch, together with the experts; B has a bias.
"""

import torch
from pydantic import PositiveInt
from torch import Tensor

from upcycle.core.types import LayerActivations
from upcycle.router_init.base import router_from_activations
from upcycle.router_init.ridge import RidgeParams
from upcycle.router_init.ridge import router as ridge_router


class LowRankParams(RidgeParams):
    rank: PositiveInt = 128
    """Directions of the hidden state that logits depend on, at most."""


@router_from_activations(
    "low_rank",
    summary="the ridge router cut down to a rank, so that its logits change least",
    paper="arXiv:2512.18452",
    params=LowRankParams,
)
def router(
    activations: LayerActivations, experts_EM: Tensor, params: LowRankParams, rng: torch.Generator
) -> Tensor:
    rows_ED = ridge_router(activations, experts_EM, params, rng)
    up_ER, down_RD = truncated(rows_ED, activations.x_TD, params.rank)
    return up_ER @ down_RD


def truncated(rows_ED: Tensor, x_TD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [E, r] and [r, D] of the matrix of this rank, or the rows' own, whose products with x
    are nearest to those of the rows."""
    xx_DD = sum((x_tD.T @ x_tD).double() for x_tD in x_TD.split(4096))
    rows_ED = rows_ED.double().to(x_TD.device)
    vectors_EE = torch.linalg.eigh(rows_ED @ xx_DD @ rows_ED.T).eigenvectors
    up_ER = vectors_EE[:, -rank:]
    return up_ER.float(), (up_ER.T @ rows_ED).float()
