"""Descent: after least squares, gate_proj, up_proj and down_proj follow the gradient of the layer's
own error for one pass over the calibration tokens.

Local reconstruction, as quantisation does it (BRECQ, arXiv:2102.05426): Σ_t w_t |y_t - ŷ_t|² with ŷ
the output of what the router selects, by Adam, without a gradient through any other layer. The
selection stays fixed. Every batch takes its tokens from all over the text, and one batch is held
out: if its error does not fall, the layer keeps what least squares gave.

The steps are relative: to each matrix's root mean square, because Adam's have no unit, and over √n
for rows of n inputs, whose outputs would otherwise move the more the wider the layer (μP,
arXiv:2203.03466).
"""

import math

import torch
from pydantic import Field
from torch import Tensor

from upcycle.conversion.compensate.base import compensation
from upcycle.conversion.compensate.least_squares import LeastSquaresParams, refit
from upcycle.core.types import DenseFFN, LayerActivations, Selection

BATCH = 512  # tokens a step
WARM_UP = 10  # steps
MATRICES = ("gate_FD", "up_FD", "down_DF")
BETAS = (0.9, 0.95)


class DescentParams(LeastSquaresParams):
    rate: float = Field(default=0.7, gt=0, le=100, allow_inf_nan=False)
    """Of the first steps, over each matrix's root mean square / √inputs; it falls to zero."""


@compensation(
    "descent",
    summary="refit down_proj in closed form, then gate_proj, up_proj and down_proj by one pass of "
    "gradient descent, to keep the hidden states near the dense model's",
    paper="ours; local reconstruction as in BRECQ, arXiv:2102.05426",
    params=DescentParams,
    refits=MATRICES,
)
def descend(
    activations: LayerActivations,
    selection: Selection,
    y_TD: Tensor,
    weight_T: Tensor,
    params: DescentParams,
) -> DenseFFN:
    start = refit(activations, selection, y_TD, weight_T, params)
    x_TD = activations.x_TD

    def error(ffn: DenseFFN, batch: slice) -> Tensor:
        x_tD = x_TD[batch]
        output_tD = (ffn.hidden(x_tD) * selection(x_tD)) @ ffn.down_DF.T
        return weight_T[batch] @ (output_tD - y_TD[batch]).square().sum(1)

    batches = max(1, len(x_TD) // BATCH)
    held_out = slice(batches - 1, None, batches)
    unit = weight_T @ y_TD.square().sum(1) / batches
    before = error(start, held_out)
    if batches == 1 or not before > 0:
        return start
    ffn = start.changed(torch.clone)
    matrices = [getattr(ffn, name).requires_grad_() for name in ffn.matrices]
    optimiser = torch.optim.Adam(
        [{"params": matrix, "lr": params.rate * _step(matrix)} for matrix in matrices], betas=BETAS
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / batches)
    )
    with torch.enable_grad():
        for step in range(batches - 1):
            optimiser.zero_grad()
            (error(ffn, slice(step, None, batches)) / unit).backward()
            optimiser.step()
            schedule.step()
    for matrix in matrices:
        matrix.requires_grad_(False)
    return ffn if error(ffn, held_out) < before else start


def _step(matrix: Tensor) -> float:
    return matrix.detach().square().mean().sqrt().item() / math.sqrt(matrix.shape[1])
