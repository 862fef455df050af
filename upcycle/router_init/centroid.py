"""Parameter centre: an expert's row is the mean of its neurons' gate rows.

MoEfication's centre router (unit rows), arXiv:2110.01786; with `normalize: false` EMoE's avg-k,
arXiv:2310.10908, and ExpertWeaver's, arXiv:2602.15521.

Departure from MoEfication: there the nearest centres by distance are selected, which subtracts
|c|² / 2 from the dot product with centre c. A router without a bias can't.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from upcycle.core.registry import Params
from upcycle.core.types import DenseFFN
from upcycle.router_init.base import router_from_weights


class CentroidParams(Params):
    normalize: bool = True
    """Scale every gate row to unit length first."""


@router_from_weights(
    "centroid",
    summary="mean of the expert's gate_proj rows",
    paper="arXiv:2110.01786",
    params=CentroidParams,
)
def router(
    ffn: DenseFFN, experts_EM: Tensor, params: CentroidParams, rng: torch.Generator
) -> Tensor:
    rows_FD = ffn.rows_FD.float()
    return (normalize(rows_FD, dim=1) if params.normalize else rows_FD)[experts_EM].mean(1)
