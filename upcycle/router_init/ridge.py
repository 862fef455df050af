"""Ridge: predict from x how much each expert matters.

An expert's energy on a token is the sum of h² |down|² over its neurons. The rows are the ridge
regression of its fourth root, in closed form from xᵀx and xᵀy: the selection hangs on which experts
are ahead, not on how far a few tokens are out, and squares would fit those few. A token's mean over
experts is taken out first: no selection can see it, and without it the logits are smaller, so that
bfloat16 rounds them less.
"""

from collections.abc import Iterator

import torch
from pydantic import PositiveFloat
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.core.regression import ridge
from upcycle.core.types import LayerActivations
from upcycle.router_init.base import router_from_activations


class RidgeParams(Params):
    strength: PositiveFloat = 0.1
    """λ over the mean second moment of x."""


@router_from_activations(
    "ridge",
    summary="ridge regression of each expert's output energy on x",
    paper="ours",
    params=RidgeParams,
)
def router(
    activations: LayerActivations, experts_EM: Tensor, params: RidgeParams, rng: torch.Generator
) -> Tensor:
    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for x_tD, energy_tE in expert_energies(activations, experts_EM):
            root_tE = energy_tE.sqrt().sqrt()
            yield x_tD, root_tE - root_tE.mean(1, keepdim=True)

    return ridge(pairs(), params.strength)


def expert_energies(
    activations: LayerActivations, experts_EM: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs [t, D] and each expert's output energy Σ h² |down|² on them [t, E]."""
    power_F = activations.ffn.down_DF.square().sum(0)
    for x_tD, h_tF in activations.chunks():
        energy_tF = h_tF.square() * power_F
        yield x_tD, energy_tF[:, experts_EM.flatten()].unflatten(1, experts_EM.shape).sum(2)
