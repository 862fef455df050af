"""Pruned copies: every expert is the FFN, less the neurons that its own tokens use least.

Between a split and whole copies: a neuron that many tokens need is in many experts, so the model
grows, and a token still runs a part of the FFN only. Experts made by pruning copies for different
text are DIVE's (arXiv:2506.09351); there the text's domain tells experts apart, here a router on
hidden states does, layer by layer.
"""

import torch
from torch import Tensor

from upcycle.core.types import LayerActivations, evenly

ALL_TOKENS = 1e-3
"""Weight of all tokens beside an expert's own: it ranks the neurons that those do not use."""
RANKING_TOKENS = 16384
"""How many of all tokens are looked at for that."""


def mean_strength(activations: LayerActivations, weight_T: Tensor) -> Tensor:
    """How much each neuron puts out on average, h² |down|², [F]; zero without tokens.

    Args:
        weight_T: how much each token counts.
    """
    power_F = activations.ffn.down_DF.square().sum(0)
    energy_F = torch.zeros_like(power_F)
    for _, h_tF, weight_t in activations.chunks(weight_T):
        energy_F += weight_t @ h_tF.square()
    return energy_F * power_F / max(1, len(weight_T))


def overall_strength(activations: LayerActivations, weight_T: Tensor) -> Tensor:
    """The same on a sample of all tokens."""
    sample = activations.sample(RANKING_TOKENS)
    return mean_strength(sample, evenly(weight_T, RANKING_TOKENS))


def strongest_neurons(
    own: LayerActivations, weight_T: Tensor, overall_F: Tensor, size: int
) -> Tensor:
    """The neurons that put out most on an expert's own tokens, [M], ascending.

    Args:
        weight_T: how much each token counts.
        overall_F: the neurons' mean strength on all tokens.
        size: M.
    """
    strength_F = mean_strength(own, weight_T) + ALL_TOKENS * overall_F
    return strength_F.topk(size).indices.sort().values
