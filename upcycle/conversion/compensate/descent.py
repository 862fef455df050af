"""Descent: after least squares, gate_proj, up_proj and down_proj follow the gradient of the layer's
own error for one pass over the calibration tokens.

Local reconstruction, as quantisation does it (BRECQ, arXiv:2102.05426): Σ_t w_t |y_t - ŷ_t|² with ŷ
the output of what the router selects, by Adam, without a gradient through any other layer. The
selection stays fixed. Every batch takes its tokens from all over the text, and one batch is held
out: if its error does not fall, the layer keeps what least squares gave.

The steps are relative (`unit_step`).
"""

from pydantic import Field
from torch import Tensor

from upcycle.conversion.compensate.base import compensation
from upcycle.conversion.compensate.least_squares import LeastSquaresParams, refit
from upcycle.conversion.fit.loop import BATCH, follow, unit_step
from upcycle.core.types import DenseFFN, LayerActivations, Selection

MATRICES = ("gate_FD", "up_FD", "down_DF")


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
    descends_from=2 * BATCH,
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
    ffn = start.changed(lambda matrix: matrix.clone())
    follow(
        [(m, params.rate * unit_step(m)) for m in (getattr(ffn, name) for name in ffn.matrices)],
        (slice(step, None, batches) for step in range(batches - 1)),
        lambda batch: error(ffn, batch) / unit,
        batches - 1,
    )
    return ffn if error(ffn, held_out) < before else start
