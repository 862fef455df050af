"""Energy: share the neurons that put most into the FFN's output, mean of h² |down|²."""

from torch import Tensor

from upcycle.registry import Params
from upcycle.shared_experts.base import shared_by
from upcycle.types import LayerActivations


@shared_by("energy", summary="largest mean output energy h² |down|²", paper="ours")
def score(activations: LayerActivations, params: Params) -> Tensor:
    return activations.energy()
