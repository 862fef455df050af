"""Co-activation clustering: neurons that matter on the same tokens share an expert.

Neuron i's profile is its activation |h_i(t)| on a sample of tokens, scaled to unit length;
balanced k-means on the profiles makes the experts. CMoE (arXiv:2502.04416) clusters
binary markers of the same kind, ExpertWeaver (arXiv:2602.15521) per-sample means.
"""

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import normalize

from upcycle.clustering import balanced_kmeans
from upcycle.registry import Params
from upcycle.split.base import split_from_activations
from upcycle.types import LayerActivations


class ProfileParams(Params):
    tokens: PositiveInt = 4096
    """Length of a profile; more tokens cost memory F x tokens and change little."""


@split_from_activations(
    "coactivation",
    summary="balanced k-means on how strongly each neuron fires, token by token",
    paper="ours; after arXiv:2502.04416",
    params=ProfileParams,
)
def split(
    activations: LayerActivations, num_experts: int, params: ProfileParams, rng: torch.Generator
) -> Tensor:
    sample = activations.sample(params.tokens)
    profile_FT = torch.cat([h_tF.abs().T for _, h_tF in sample.chunks()], dim=1)
    members_EM, _ = balanced_kmeans(normalize(profile_FT, dim=1), num_experts, rng)
    return members_EM
