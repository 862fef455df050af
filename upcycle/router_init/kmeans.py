"""k-means of the FFN's inputs: an expert's row is the centre of a region of hidden states.

LLaMA-MoE v2, arXiv:2411.15708: raw centroids of a balanced k-means. There experts are made for
the clusters; here the experts exist already, so clusters and experts are matched one to one where
each expert's output energy is largest (for copies any matching is the same). The clusters are those
of `token_clusters`, of as many tokens, whose experts are then matched with their own, but for close
ones where importance is Taylor's.
"""

from collections.abc import Sequence

import torch
from pydantic import PositiveInt
from torch import Tensor

from upcycle.core.clustering import balanced_kmeans, kmeans
from upcycle.core.registry import Params
from upcycle.core.types import DenseFFN, LayerActivations
from upcycle.router_init.base import router_from_activations


class KMeansParams(Params):
    tokens: PositiveInt = 8192
    """Hidden states that are clustered."""
    balanced: bool = True
    """Whether clusters hold equally many hidden states, or as many as lie nearest."""


@router_from_activations(
    "kmeans",
    summary="centroids of a k-means of the hidden states, balanced or not",
    paper="arXiv:2411.15708",
    params=KMeansParams,
    tells_copies_apart=True,
)
def router(
    activations: LayerActivations, experts_EM: Tensor, params: KMeansParams, rng: torch.Generator
) -> Tensor:
    if params.balanced:
        return clusters(activations, experts_EM, params.tokens, rng).mean(1)
    x_TD = whole_parts(activations, len(experts_EM), params.tokens)
    members, centroids_CD = kmeans(x_TD, len(experts_EM), rng)
    return centroids_CD[matching(activations.ffn, x_TD, members, experts_EM)]


def clusters(
    activations: LayerActivations, experts_EM: Tensor, tokens: int, rng: torch.Generator
) -> Tensor:
    """The hidden states of each expert's cluster of a balanced k-means, [E, t, D].

    Args:
        tokens: how many are clustered at most.
    """
    x_TD = whole_parts(activations, len(experts_EM), tokens)
    members_Ct, _ = balanced_kmeans(x_TD, len(experts_EM), rng)
    return x_TD[members_Ct[matching(activations.ffn, x_TD, list(members_Ct), experts_EM)]]


def whole_parts(activations: LayerActivations, num_clusters: int, tokens: int) -> Tensor:
    """At most so many hidden states, as many to each cluster, [T, D]."""
    x_TD = activations.sample(tokens).x_TD
    return x_TD[: len(x_TD) // num_clusters * num_clusters]


def matching(ffn: DenseFFN, x_TD: Tensor, members: Sequence[Tensor], experts_EM: Tensor) -> Tensor:
    """The cluster of each expert, [E]: one to one, where the experts put out most.

    Args:
        members: which of the hidden states are in each cluster.
    """
    from scipy.optimize import linear_sum_assignment

    power_F = ffn.down_DF.square().sum(0)
    # Of no hidden states there is no mean.
    square_CF = [ffn.hidden(x_TD[some]).square().sum(0) / max(1, len(some)) for some in members]
    energy_CE = torch.stack(
        [(square_F * power_F)[experts_EM].sum(1) for square_F in square_CF]
    ).cpu()
    share_CE = energy_CE / energy_CE.mean(0).clamp_min(torch.finfo(torch.float32).tiny)
    matched, experts = linear_sum_assignment(share_CE.numpy(), maximize=True)
    return torch.from_numpy(matched[experts.argsort()])
