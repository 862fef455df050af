"""Token clusters: an expert is made for a region of hidden states, of what matters there.

LLaMA-MoE v2's split, arXiv:2411.15708: k-means of the FFN's inputs; a neuron's importance to a
cluster is averaged over the tokens that the cluster's centroid has the largest dot product with;
neurons go where they are most important, equally many to each cluster.

Departures, unless asked for: the paper's importance is |h ∂loss/∂h| (`importance=taylor`), and it
deals neurons out greedily (`assignment=greedy`). By default a neuron matters by what it puts out,
|h| |down|, which takes no backward pass, and the assignment is near-optimal.
"""

from typing import Literal

import torch
from torch import Tensor

from upcycle.core.clustering import (
    balanced_assignment,
    greedy_assignment,
    importance_by_cluster,
)
from upcycle.core.importance import ClusterImportanceParams
from upcycle.core.types import LayerActivations
from upcycle.split.base import split_from_activations


class HiddenClustersParams(ClusterImportanceParams):
    balanced: bool = True
    """Whether clusters hold equally many hidden states, or as many as lie nearest."""


class TokenClustersParams(HiddenClustersParams):
    assignment: Literal["optimal", "greedy"] = "optimal"
    """Neurons go to clusters so that as much importance as can be is kept, or nearly; or the pair
    of neuron and cluster of the largest importance first, and so on."""


@split_from_activations(
    "token_clusters",
    summary="neurons that matter most on a cluster of hidden states",
    paper="arXiv:2411.15708",
    params=TokenClustersParams,
)
def split(
    activations: LayerActivations,
    num_experts: int,
    params: TokenClustersParams,
    rng: torch.Generator,
) -> Tensor:
    sample = activations.sample(params.tokens)
    importance_CF = importance_by_cluster(
        sample, num_experts, rng, params.balanced, params.importance
    )
    if params.assignment == "greedy":
        owner_F = greedy_assignment(importance_CF)
    else:
        owner_F = balanced_assignment(-importance_CF.T.contiguous())
    return owner_F.argsort(stable=True).view(num_experts, -1)
