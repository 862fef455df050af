"""What neurons matter by: scores that several methods share, and their parameters.

Taylor importance is |h ∂loss/∂h|: to first order, how much the loss changes when a neuron puts out
nothing (Molchanov et al., CVPR 2019, arXiv:1906.10771). The gradient is the dense model's, from one
backward pass before the first layer is converted; h is what the neuron puts out there, or, where
layers are fitted on converted ones (`sequential`), on what these put out.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.core.types import LayerActivations

Importance = Literal["output", "taylor"]
"""What a neuron matters by on a token: |h| |down|, how much it puts out, or |h ∂loss/∂h|."""


class ClusterImportanceParams(Params):
    tokens: PositiveInt = 8192
    """Hidden states that are clustered, and over which importance is averaged."""
    importance: Importance = "output"
    """What a neuron matters by on a token: `output`, |h| |down|; or `taylor`, |h ∂loss/∂h|, which
    takes a backward pass through the dense model."""

    @property
    def needs_gradients(self) -> bool:
        return self.importance == "taylor"


class GradientParams(Params):
    """Of a method that always looks at gradients."""

    @property
    def needs_gradients(self) -> bool:
        return True


def importances(activations: LayerActivations, by: Importance) -> Iterator[tuple[Tensor, ...]]:
    """Inputs x [t, D] and how much each neuron matters on these tokens [t, F]."""
    if by == "taylor":
        for x_tD, effect_tF in activations.effects():
            yield x_tD, effect_tF.abs()
        return
    norm_F = activations.ffn.down_DF.norm(dim=0)
    for x_tD, h_tF in activations.chunks():
        yield x_tD, h_tF.abs() * norm_F


def taylor_by_token(activations: LayerActivations) -> Tensor:
    """Σ |h ∂loss/∂h| over all tokens, [F]."""
    sums = [effect_tF.abs().double().sum(0) for _, effect_tF in activations.effects()]
    return torch.stack(sums).sum(0).float()


def taylor_by_text(activations: LayerActivations) -> Tensor:
    """Σ |Σ h ∂loss/∂h| over sequences and over each one's tokens, [F]."""
    text_T = activations.gradient.text_T
    texts, num_neurons = int(text_T.max()) + 1, activations.ffn.num_neurons
    sum_BF = activations.x_TD.new_zeros(texts, num_neurons, dtype=torch.float64)
    for _, effect_tF, text_t in activations.effects(text_T):
        sum_BF.index_add_(0, text_t, effect_tF.double())
    return sum_BF.abs().sum(0).float()
