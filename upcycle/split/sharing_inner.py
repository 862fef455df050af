"""Sharing-Inner: each expert takes what matters most to it, whatever the others take.

LLaMA-MoE's split, arXiv:2406.16554: an expert is made for a cluster of text and holds the M neurons
that matter most there. Some neurons are then in several experts, and some in none.

Departures: clusters are of hidden states, layer by layer, and a token counts where the centroid has
the largest dot product with it, as in LLaMA-MoE v2. Unless `importance` is `taylor`, the
paper's |h ∂loss/∂h|, a neuron matters by what it puts out, |h| |down|.
"""

import torch
from torch import Tensor

from upcycle.core.clustering import importance_by_cluster
from upcycle.core.types import LayerActivations
from upcycle.split.base import split_from_activations
from upcycle.split.token_clusters import HiddenClustersParams


@split_from_activations(
    "sharing_inner",
    summary="what matters most on each cluster of hidden states; experts may hold the same neuron",
    paper="arXiv:2406.16554",
    params=HiddenClustersParams,
    partitions=False,
)
def split(
    activations: LayerActivations,
    num_experts: int,
    params: HiddenClustersParams,
    rng: torch.Generator,
) -> Tensor:
    sample = activations.sample(params.tokens)
    importance_EF = importance_by_cluster(
        sample, num_experts, rng, params.balanced, params.importance
    )
    size = importance_EF.shape[1] // num_experts
    return importance_EF.topk(size).indices.sort(dim=1).values
