"""Token clusters: an expert is made for a region of hidden states, of what matters there.

LLaMA-MoE v2's split, arXiv:2411.15708: k-means of the FFN's inputs; a neuron's importance to a
cluster is averaged over the tokens that the cluster's centroid has the largest dot product with;
neurons go where they are most important, equally many to each cluster. The paper's importance is
|h ∂loss/∂h|; without a backward pass, it is what the neuron puts out, |h| |down|.
"""

import torch
from pydantic import PositiveInt
from torch import Tensor

from upcycle.core.clustering import balanced_assignment, importance_by_cluster
from upcycle.core.registry import Params
from upcycle.core.types import LayerActivations
from upcycle.split.base import split_from_activations


class TokenClustersParams(Params):
    tokens: PositiveInt = 8192
    """Hidden states that are clustered, and over which importance is averaged."""
    balanced: bool = True
    """Whether clusters hold equally many hidden states, or as many as lie nearest."""


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
    importance_CF = importance_by_cluster(sample, num_experts, rng, params.balanced)
    owner_F = balanced_assignment(-importance_CF.T.contiguous())
    return owner_F.argsort(stable=True).view(num_experts, -1)
