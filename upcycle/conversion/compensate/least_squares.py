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
    fewer_tokens = len(activations.x_TD) < activations.ffn.num_neurons
    solve = _by_tokens if fewer_tokens else _by_neurons
    return solve(activations, selection, y_TD, weight_T, params.strength)


def _by_neurons(
    activations: LayerActivations,
    selection: Selection,
    y_TD: Tensor,
    weight_T: Tensor,
    strength: float,
) -> DenseFFN:
    """With the normal equations, [F, F], in one pass over the tokens."""
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
    before_FD = _before(down_DF, likeness_F, power_F)
    hy_FD += hh_FF @ (down_DF.T - before_FD)
    hh_FF.diagonal().add_(_penalty(moment_F, strength))
    change_FD = torch.cholesky_solve(hy_FD, torch.linalg.cholesky(hh_FF))
    return replace(activations.ffn, down_DF=(before_FD + change_FD).T.to(down_DF.dtype))


def _by_tokens(
    activations: LayerActivations,
    selection: Selection,
    y_TD: Tensor,
    weight_T: Tensor,
    strength: float,
) -> DenseFFN:
    """The same by a system of [T, T]: with H the rows √w_t h̃_t, R those of what is missing and Λ
    the penalty, (HᵀH + Λ)⁻¹ Hᵀ R = Λ⁻¹ Hᵀ (H Λ⁻¹ Hᵀ + 1)⁻¹ R."""
    down_DF = activations.ffn.down_DF
    on_TF = down_DF.new_empty(len(y_TD), activations.ffn.num_neurons)
    likeness_F = down_DF.new_zeros(len(on_TF[0]), dtype=torch.float64)
    for x_tD, h_tF, weight_t, room_tF in activations.chunks(weight_T, on_TF):
        torch.mul(h_tF, selection(x_tD), out=room_tF)
        likeness_F += (room_tF * h_tF * weight_t[:, None]).sum(0)
    on_TF *= weight_T.sqrt()[:, None]
    power_F = on_TF.square().sum(0).double()
    if not power_F.any():
        return activations.ffn
    before_FD = _before(down_DF, likeness_F, power_F)
    missing_TD = y_TD * weight_T.sqrt()[:, None] - on_TF @ before_FD.to(on_TF)
    held_TF = on_TF / _penalty(power_F, strength).to(on_TF)
    system_TT = (held_TF @ on_TF.T).double()
    system_TT.diagonal().add_(1)
    share_TD = torch.cholesky_solve(missing_TD.double(), torch.linalg.cholesky(system_TT))
    change_FD = held_TF.T @ share_TD.to(held_TF)
    return replace(activations.ffn, down_DF=(before_FD + change_FD).T.to(down_DF.dtype))


def _before(down_DF: Tensor, likeness_F: Tensor, power_F: Tensor) -> Tensor:
    """W⁰, [F, D] in float64."""
    return down_DF.T * torch.where(power_F > 0, likeness_F / power_F, 1.0)[:, None]


def _penalty(moment_F: Tensor, strength: float) -> Tensor:
    return strength * moment_F + JITTER * moment_F.mean()
