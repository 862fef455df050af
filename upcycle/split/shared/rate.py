"""Activation rate: share the neurons that are most often among a token's strongest.

CMoE's ATopK markers, arXiv:2502.04416: per token, the K_a neurons of largest |h|.
"""

import torch
from pydantic import PositiveInt
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.core.types import LayerActivations
from upcycle.split.shared.base import shared_by


class RateParams(Params):
    strongest: PositiveInt = 10
    """K_a, the number of neurons that are marked per token."""


@shared_by(
    "rate",
    summary="most often among a token's strongest |h|",
    paper="arXiv:2502.04416",
    params=RateParams,
)
def score(activations: LayerActivations, params: RateParams) -> Tensor:
    num_neurons = activations.ffn.num_neurons
    strongest = min(params.strongest, num_neurons)
    marked = [
        h_tF.abs().topk(strongest, dim=1).indices.flatten().bincount(minlength=num_neurons)
        for _, h_tF in activations.chunks()
    ]
    return torch.stack(marked).sum(0)
