"""Ridge regression from streamed sufficient statistics."""

from collections.abc import Iterable

import torch
from torch import Tensor


def ridge(pairs: Iterable[tuple[Tensor, Tensor]], strength: float) -> Tensor:
    """W [E, D] that minimises |x Wᵀ - y|² + λ|W|² over pairs (x [t, D], y [t, E]).

    λ is `strength` times the mean second moment of x, so it has no unit. Only xᵀx [D, D] and
    xᵀy [D, E] are held, added up in float64.
    """
    xx_DD = xy_DE = torch.zeros((), dtype=torch.float64)
    for x_tD, y_tE in pairs:
        xx_DD = xx_DD + (x_tD.T @ x_tD).double()
        xy_DE = xy_DE + (x_tD.T @ y_tE).double()
    penalty = strength * xx_DD.diagonal().mean()
    xx_DD = xx_DD + penalty * torch.eye(len(xx_DD), dtype=xx_DD.dtype, device=xx_DD.device)
    factor = torch.linalg.cholesky(xx_DD)
    return torch.cholesky_solve(xy_DE, factor).T.float()
