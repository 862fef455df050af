"""Pruned copies: every expert is the FFN, less the neurons that its own tokens use least.

Between a split and whole copies: a neuron that many tokens need is in many experts, so the model
grows, and a token still runs a part of the FFN only. Experts made by pruning copies for different
text are DIVE's (arXiv:2506.09351); there the text's domain tells experts apart, here a router on
hidden states does, layer by layer.
"""

from torch import Tensor

from upcycle.types import LayerActivations

ALL_TOKENS = 1e-3
"""Weight of all tokens beside an expert's own: it ranks the neurons that those do not use."""


def strongest_neurons(
    activations: LayerActivations, chosen_T: Tensor, num_experts: int, size: int, weight_T: Tensor
) -> Tensor:
    """The neurons that put out most on each expert's tokens, [E, M], ascending.

    Args:
        chosen_T: each token's expert.
        size: M.
        weight_T: how much each token counts.
    """
    power_F = activations.ffn.down_DF.square().sum(0)
    energy_EF = power_F.new_zeros(num_experts, len(power_F))
    done = 0
    for x_tD, h_tF in activations.chunks():
        token = slice(done, done + len(x_tD))
        done += len(x_tD)
        energy_EF.index_add_(0, chosen_T[token], h_tF.square() * weight_T[token, None])
    tokens_E = chosen_T.bincount(minlength=num_experts)
    overall_F = energy_EF.sum(0) / max(1, len(chosen_T))
    mean_EF = energy_EF / tokens_E.clamp_min(1)[:, None] + ALL_TOKENS * overall_F
    return (mean_EF * power_F).topk(size).indices.sort(dim=1).values.cpu()
