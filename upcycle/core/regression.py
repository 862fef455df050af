"""Linear prediction from streamed sufficient statistics.

Only xᵀx [D, D] and xᵀy [D, E] are held, added up in float64; how many tokens there are does not
matter. A ridge penalty λ is given as `strength` times the mean second moment of x, so it has no
unit.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from upcycle.core.errors import UpcycleError

Pairs = Iterable[tuple[Tensor, Tensor]]
"""Inputs x [t, D] and targets y [t, E]."""


def ridge(pairs: Pairs, strength: float) -> Tensor:
    """W [E, D] that minimises |x Wᵀ - y|² + λ|W|²."""
    factor_DD, xy_DE = _factor(pairs, strength)
    return torch.cholesky_solve(xy_DE, factor_DD).T.float()


def predictable_profiles(pairs: Pairs, strength: float) -> Tensor:
    """Rows [E, D] whose distances are those between the ridge predictions of the targets.

    With xᵀx + λ = L Lᵀ and W the ridge regression, the rows are W L: two targets whose predictions
    are close on the tokens (and under the penalty) have close rows. Since W = (L⁻ᵀ L⁻¹ xᵀy)ᵀ, they
    are (L⁻¹ xᵀy)ᵀ, one triangular solve.
    """
    factor_DD, xy_DE = _factor(pairs, strength)
    rows_DE: Tensor = torch.linalg.solve_triangular(factor_DD, xy_DE, upper=False)
    return rows_DE.T.float()


def sharpness(
    logits_TE: Tensor, target_TE: Tensor, *, most: float, beside_TE: Tensor | float = 0.0
) -> float:
    """The factor, from 1 to `most`, by which logits make their softmax most like the target: that
    of the least cross-entropy, whose slope grows with the factor.

    Args:
        target_TE: shares; a row's sum is what its token counts.
        beside_TE: what is added to the logits and not multiplied.
    """
    from scipy.optimize import brentq

    logits_TE, target_TE = logits_TE.double(), target_TE.double()
    weight_T1 = target_TE.sum(1, keepdim=True)

    def slope(factor: float) -> float:
        chosen_TE = (factor * logits_TE + beside_TE).softmax(1) * weight_T1
        return float((chosen_TE - target_TE).mul(logits_TE).sum())

    if slope(1.0) >= 0:
        return 1.0
    if slope(most) <= 0:
        return most
    return float(brentq(slope, 1.0, most, rtol=1e-4))


def _factor(pairs: Pairs, strength: float) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of xᵀx + λ, and xᵀy.

    Raises:
        UpcycleError: x is zero.
    """
    xx_DD = xy_DE = torch.zeros((), dtype=torch.float64)
    for x_tD, y_tE in pairs:
        xx_DD = xx_DD + (x_tD.T @ x_tD).double()
        xy_DE = xy_DE + (x_tD.T @ y_tE).double()
    penalty = strength * xx_DD.diagonal().mean()
    if not penalty > 0:
        raise UpcycleError(
            "there is nothing to fit on: the activations of a layer are all 0 on the calibration "
            "text, so its weights are damaged"
        )
    identity = torch.eye(len(xx_DD), dtype=xx_DD.dtype, device=xx_DD.device)
    return torch.linalg.cholesky(xx_DD + penalty * identity), xy_DE
