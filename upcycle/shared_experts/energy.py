"""Energy: share the neurons that put most into the FFN's output, mean of h² |down|²."""

import torch
from torch import Tensor

from upcycle.registry import Params
from upcycle.shared_experts.base import shared_by
from upcycle.types import LayerActivations


@shared_by("energy", summary="largest mean output energy h² |down|²", paper="ours")
def score(activations: LayerActivations, params: Params) -> Tensor:
    power_F = torch.stack([h_tF.square().sum(0) for _, h_tF in activations.chunks()]).sum(0)
    return power_F * activations.ffn.down_DF.square().sum(0)
