"""Innovations: what a neuron adds to neurons that are always on.

Where down_proj is refit, the shared neurons stand in for whatever of the routed ones can be
foretold from them. So that much is not lost when a routed neuron is off, and should count neither
for whom it shares an expert with nor for when its expert is selected. What counts is the rest, the
innovation of linear prediction: h_R - C h_S, with C by ridge regression on the calibration tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from upcycle.core.types import LayerActivations

STRENGTH = 0.01  # of the ridge penalty, over the shared neurons' mean second moment


@dataclass(frozen=True, kw_only=True)
class Innovations(LayerActivations):
    """Some neurons' activations less what others foretell of them."""

    everything: LayerActivations
    neurons_R: Tensor
    others_S: Tensor
    foretold_SR: Tensor

    def chunks(self, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
        for x_tD, h_tF, *rows in self.everything.chunks(*beside):
            rest_tR = h_tF[:, self.neurons_R] - h_tF[:, self.others_S] @ self.foretold_SR
            yield x_tD, rest_tR, *rows

    def take(self, neurons: Tensor) -> "Innovations":
        return replace(
            self,
            ffn=self.ffn.take(neurons),
            neurons_R=self.neurons_R[neurons],
            foretold_SR=self.foretold_SR[:, neurons],
        )

    def on(self, tokens: slice | Tensor) -> "Innovations":
        some = self.everything.on(tokens)
        return replace(self, x_TD=some.x_TD, loss=some.loss, everything=some)


def innovations(
    activations: LayerActivations, neurons_R: Tensor, others_S: Tensor, weight_T: Tensor
) -> LayerActivations:
    """The activations of `neurons_R` less what those of `others_S` foretell of them.

    Args:
        weight_T: how much each token counts in the regression, as in the refit.
    """
    if not len(others_S):
        return activations.take(neurons_R)
    moment_SS = moment_SR = torch.zeros((), dtype=torch.float64)
    for _, h_tF, weight_t in activations.chunks(weight_T):
        h_tS, h_tR = h_tF[:, others_S], h_tF[:, neurons_R]
        weighted_St = (h_tS * weight_t[:, None]).T
        moment_SS = moment_SS + (weighted_St @ h_tS).double()
        moment_SR = moment_SR + (weighted_St @ h_tR).double()
    penalty = STRENGTH * moment_SS.diagonal().mean()
    if not penalty > 0:  # nothing that is always on puts anything out
        return activations.take(neurons_R)
    moment_SS.diagonal().add_(penalty)
    foretold_SR = torch.cholesky_solve(moment_SR, torch.linalg.cholesky(moment_SS))
    return Innovations(
        ffn=activations.ffn.take(neurons_R),
        x_TD=activations.x_TD,
        loss=activations.loss,
        everything=activations,
        neurons_R=neurons_R,
        others_S=others_S,
        foretold_SR=foretold_SR.to(activations.x_TD.dtype),
    )
