"""Least squares: refit down_proj so that the active neurons give the output y that is wanted: the
whole FFN's, or one that makes up for earlier layers, too.

With h̃ the activations h times what each neuron counts for a token, zero where it is not selected,
W minimises Σ_t w_t |y_t - W h̃_t|² + λ Σ_i a_i |W_i - W⁰_i|², with a_i = Σ_t w_t h̃_ti²: each
neuron's column is held to its value before in proportion to how much the neuron does. That value
W⁰_i is the dense one, times the factor that makes h̃_i most like h_i on the tokens that select it.
At W⁰ the second term is zero, so the error on the calibration tokens is never larger than there.
Closed form; the idea is optimal brain surgery's (Hassibi and Stork, 1993).
"""

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from upcycle.conversion.compensate.base import compensation
from upcycle.core.registry import Params
from upcycle.core.types import DenseFFN, LayerActivations, Selection

JITTER = 1e-6  # of the mean second moment: for neurons that were never on


class LeastSquaresParams(Params):
    strength: float = Field(default=0.3, ge=1e-3, allow_inf_nan=False)
    """λ, over each neuron's own second moment."""
    feedback: float | None = Field(default=None, ge=0, le=1)
    """How far the wanted output is moved from the dense FFN's, on what the layer sees, to the one
    that would bring the hidden states back to the dense model's. By default half the way, or the
    active share if that is less (docs/concepts/feedback.md has what was measured)."""


@compensation(
    "least_squares",
    summary="refit down_proj in closed form, to keep the hidden states near the dense model's",
    paper="ours",
    params=LeastSquaresParams,
    refits=("down_DF",),
)
def refit(
    activations: LayerActivations,
    selection: Selection,
    y_TD: Tensor,
    weight_T: Tensor,
    params: LeastSquaresParams,
) -> DenseFFN:
    down_DF = activations.ffn.down_DF
    hidden, num_neurons = down_DF.shape
    hh_FF = down_DF.new_zeros(num_neurons, num_neurons, dtype=torch.float64)
    hy_FD = down_DF.new_zeros(num_neurons, hidden, dtype=torch.float64)
    likeness_F = torch.zeros_like(hh_FF[0])
    power_F = torch.zeros_like(hh_FF[0])
    for x_tD, h_tF, y_tD, weight_t in activations.chunks(y_TD, weight_T):
        on_tF = h_tF * selection(x_tD)
        missing_tD = y_tD - on_tF @ down_DF.T
        weighted_tF = on_tF * weight_t[:, None]
        hh_FF += weighted_tF.T @ on_tF
        hy_FD += weighted_tF.T @ missing_tD
        likeness_F += (weighted_tF * h_tF).sum(0)
        power_F += (weighted_tF * on_tF).sum(0)
    moment_F = hh_FF.diagonal().clone()
    if not moment_F.any():
        return activations.ffn
    factor_F = torch.where(power_F > 0, likeness_F / power_F, 1.0)
    before_FD = down_DF.T * factor_F[:, None]
    hy_FD += hh_FF @ (down_DF.T - before_FD)
    hh_FF.diagonal().add_(params.strength * moment_F + JITTER * moment_F.mean())
    change_FD = torch.cholesky_solve(hy_FD, torch.linalg.cholesky(hh_FF))
    return replace(activations.ffn, down_DF=(before_FD + change_FD).T.to(down_DF.dtype))
