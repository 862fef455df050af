"""Consensus: share the neurons that most experts want.

LLaMA-MoE's Sharing-Inter, arXiv:2406.16554, as released: an expert is made for a cluster of text
and wants the M neurons that matter most there. Those that most experts want are shared, the
experts want others in their place, and so on until the shared expert is full.

Departures: clusters are of hidden states, layer by layer, and a token counts where the centroid has
the largest dot product with it, as in LLaMA-MoE v2. Unless `importance` is `taylor`, the
paper's |h ∂loss/∂h|, a neuron matters by what it puts out, |h| |down|.
"""

import torch
from torch import Tensor

from upcycle.core.clustering import importance_by_cluster
from upcycle.core.importance import ClusterImportanceParams
from upcycle.core.types import Geometry, LayerActivations
from upcycle.split.shared.base import shared_by_experts


@shared_by_experts(
    "consensus",
    summary="wanted by most experts, each made for a cluster of hidden states",
    paper="arXiv:2406.16554",
    params=ClusterImportanceParams,
)
def score(
    activations: LayerActivations,
    geometry: Geometry,
    params: ClusterImportanceParams,
    rng: torch.Generator,
) -> Tensor:
    sample = activations.sample(params.tokens)
    importance_EF = importance_by_cluster(sample, geometry.num_experts, rng, by=params.importance)
    return seniority(importance_EF, geometry.expert_size, geometry.shared_size)


def seniority(importance_EF: Tensor, size: int, room: int) -> Tensor:
    """For how many rounds each neuron has been shared [F], once `room` neurons are."""
    shared_F = torch.zeros(importance_EF.shape[1], dtype=torch.bool)
    rounds_F = torch.zeros(importance_EF.shape[1])
    while shared_F.sum() < room:
        wanted_EM = importance_EF.masked_fill(shared_F, -torch.inf).topk(size).indices
        votes_F = wanted_EM.flatten().bincount(minlength=len(shared_F))
        shared_F |= votes_F == votes_F.max()
        rounds_F += shared_F
    return rounds_F
