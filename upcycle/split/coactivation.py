"""Co-activation clustering: neurons that fire on the same tokens share an expert.

Neuron i's profile is its activation |h_i(t)| on a sample of tokens, scaled to unit length;
balanced k-means on the profiles makes the experts. With `markers`, a profile only marks the tokens
on which the neuron is among the strongest, and the clusters start at the neurons that are marked
most often, as in CMoE (arXiv:2502.04416).

Departures from CMoE: only routed neurons are marked, distances are squared (L1 in its code, which
assigns once), and only a sample of the tokens is looked at.
"""

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn.functional import normalize

from upcycle.core.clustering import balanced_kmeans, balanced_lloyd
from upcycle.core.registry import Params
from upcycle.core.types import LayerActivations
from upcycle.split.base import split_from_activations


class ProfileParams(Params):
    tokens: PositiveInt = 4096
    """Length of a profile; more tokens cost memory F x tokens and change little."""
    markers: PositiveInt | None = None
    """Mark this many neurons per token, those of largest |h|, instead of how strongly all fire."""


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
    profile_FT = torch.cat([_profile(h_tF, params.markers).T for _, h_tF in sample.chunks()], dim=1)
    if params.markers is None:
        return balanced_kmeans(normalize(profile_FT, dim=1), num_experts, rng)[0]
    mark_FT = profile_FT.float().cpu()
    most_marked_E = mark_FT.sum(1).argsort(descending=True, stable=True)[:num_experts]
    return balanced_lloyd(mark_FT, mark_FT[most_marked_E])[0]


def _profile(h_tF: Tensor, markers: int | None) -> Tensor:
    """How strongly each neuron fires [t, F]; with markers, 1 where it is among the strongest."""
    strength_tF = h_tF.abs()
    if markers is None:
        return strength_tF
    marked = strength_tF.topk(min(markers, h_tF.shape[1]), dim=1).indices
    return torch.zeros_like(strength_tF).scatter_(1, marked, 1.0)
