"""Energy: share the neurons that put most into the FFN's output, mean of h² |down|²."""

from torch import Tensor

from upcycle.core.registry import Params
from upcycle.core.types import LayerActivations
from upcycle.split.shared.base import shared_by


@shared_by("energy", summary="largest mean output energy h² |down|²", paper="ours")
def score(activations: LayerActivations, params: Params) -> Tensor:
    return activations.energy()
