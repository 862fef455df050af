"""k-means of the FFN's inputs: an expert's row is the centre of a region of hidden states.

LLaMA-MoE v2, arXiv:2411.15708: raw centroids of a balanced k-means. There experts are made for
the clusters; here the experts exist already, so clusters and experts are matched one to one where
each expert's output energy is largest (for copies any matching is the same). The clusters are those
of `token_clusters`, of as many tokens, whose experts are then matched with their own.
"""

import torch
from pydantic import PositiveInt
from torch import Tensor

from upcycle.core.clustering import balanced_kmeans
from upcycle.core.registry import Params
from upcycle.core.types import LayerActivations
from upcycle.router_init.base import router_from_activations


class KMeansParams(Params):
    tokens: PositiveInt = 8192
    """Hidden states that are clustered."""


@router_from_activations(
    "kmeans",
    summary="centroids of a balanced k-means of the hidden states",
    paper="arXiv:2411.15708",
    params=KMeansParams,
    tells_copies_apart=True,
)
def router(
    activations: LayerActivations, experts_EM: Tensor, params: KMeansParams, rng: torch.Generator
) -> Tensor:
    return clusters(activations, experts_EM, params.tokens, rng).mean(1)


def clusters(
    activations: LayerActivations, experts_EM: Tensor, tokens: int, rng: torch.Generator
) -> Tensor:
    """The hidden states of each expert's cluster, [E, t, D].

    Args:
        tokens: how many are clustered at most.
    """
    from scipy.optimize import linear_sum_assignment

    num_experts = len(experts_EM)
    x_TD = activations.sample(tokens).x_TD
    x_TD = x_TD[: len(x_TD) // num_experts * num_experts]
    members_Ct, _ = balanced_kmeans(x_TD, num_experts, rng)
    power_F = activations.ffn.down_DF.square().sum(0)
    energy_CE = torch.stack(
        [
            (activations.ffn.hidden(x_TD[members]).square().mean(0) * power_F)[experts_EM].sum(1)
            for members in members_Ct
        ]
    ).cpu()
    share_CE = energy_CE / energy_CE.mean(0).clamp_min(torch.finfo(torch.float32).tiny)
    matched, experts = linear_sum_assignment(share_CE.numpy(), maximize=True)
    return x_TD[members_Ct[torch.from_numpy(matched[experts.argsort()])]]
