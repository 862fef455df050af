"""Ranked: neurons in order of their mean output energy, so that the first expert is the strongest.

With the `static` router this is a fixed mask of the strongest neurons: pruning, which any routing
has to beat to be worth its trouble.
"""

import torch
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.core.types import LayerActivations
from upcycle.split.base import split_from_activations


@split_from_activations("ranked", summary="strongest neurons first", paper="baseline")
def split(
    activations: LayerActivations, num_experts: int, params: Params, rng: torch.Generator
) -> Tensor:
    energy_F = activations.energy().cpu()
    order_F = energy_F.argsort(descending=True, stable=True)
    return order_F.view(num_experts, -1).sort(1).values
