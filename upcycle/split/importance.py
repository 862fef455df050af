"""What neurons matter by: parameters and scores that several methods share.

Taylor importance is |h ∂loss/∂h|: to first order, how much the loss changes when a neuron puts out
nothing (Molchanov et al., CVPR 2019, arXiv:1906.10771). The gradient is the dense model's, from one
backward pass before the first layer is converted; h is what the neuron puts out there, or, where
layers are fitted on converted ones (`sequential`), on what these put out.
"""

import torch
from pydantic import PositiveInt
from torch import Tensor

from upcycle.core.clustering import Importance
from upcycle.core.registry import Params
from upcycle.core.types import LayerActivations


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


def taylor_by_token(activations: LayerActivations) -> Tensor:
    """Σ |h ∂loss/∂h| over all tokens, [F] in float64."""
    return torch.stack([e_tF.abs().sum(0).double() for _, e_tF in activations.effects()]).sum(0)


def taylor_by_text(activations: LayerActivations) -> Tensor:
    """Σ |Σ h ∂loss/∂h| over sequences and over each one's tokens, [F] in float64."""
    text_T = activations.gradient.text_T
    texts, num_neurons = int(text_T.max()) + 1, activations.ffn.num_neurons
    sum_BF = activations.x_TD.new_zeros(texts, num_neurons, dtype=torch.float64)
    for _, effect_tF, text_t in activations.effects(text_T):
        sum_BF.index_add_(0, text_t, effect_tF.double())
    return sum_BF.abs().sum(0)
