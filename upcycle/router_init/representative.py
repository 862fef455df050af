"""Representative neuron: an expert is as useful as its most typical neuron is active.

CMoE, arXiv:2502.04416: the neuron whose activation profile lies nearest to the expert's mean
profile stands for the expert, which scores |act(gate x) * (up x)|.

Departures: that score is not linear in x and no native target holds it. The rows are its ridge
regression on x. A profile is |h|, where the paper's is the markers that the neurons are clustered
by.
"""

from collections.abc import Iterator

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize

from upcycle.core.registry import Params
from upcycle.core.regression import ridge
from upcycle.core.types import LayerActivations
from upcycle.router_init.base import router_from_activations


class RepresentativeParams(Params):
    tokens: PositiveInt = 4096
    """Length of the profiles that representatives are picked by."""
    strength: PositiveFloat = 0.1
    """λ of the regression, over the mean second moment of x."""


@router_from_activations(
    "representative",
    summary="linear fit of |h| of each expert's most typical neuron",
    paper="arXiv:2502.04416",
    params=RepresentativeParams,
)
def router(
    activations: LayerActivations,
    experts_EM: Tensor,
    params: RepresentativeParams,
    rng: torch.Generator,
) -> Tensor:
    chosen = activations.take(representatives(activations.sample(params.tokens), experts_EM))

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for x_tD, h_tE in chosen.chunks():
            score_tE = h_tE.abs()
            yield x_tD, score_tE - score_tE.mean(1, keepdim=True)

    return ridge(pairs(), params.strength)


def representatives(sample: LayerActivations, experts_EM: Tensor) -> Tensor:
    """The neuron of each expert nearest to its mean profile, [E]."""
    profile_FT = torch.cat([h_tF.abs().T for _, h_tF in sample.chunks()], dim=1)
    profile_EMT = normalize(profile_FT, dim=1)[experts_EM]
    distance_EM = (profile_EMT - profile_EMT.mean(1, keepdim=True)).square().sum(2)
    return experts_EM.gather(1, distance_EM.cpu().argmin(1, keepdim=True))[:, 0]
