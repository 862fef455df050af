"""Static: the same experts for every token, those of largest mean output energy.

A router without a bias can't be constant, but nearly: hidden states have a direction in which they
hardly differ, and ridge regression of a constant on x finds it. Together with the `ranked` split a
baseline for routing.
"""

from collections.abc import Iterator

import torch
from pydantic import PositiveFloat
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.core.regression import ridge
from upcycle.core.types import LayerActivations
from upcycle.router_init.base import router_from_activations


class StaticParams(Params):
    strength: PositiveFloat = 1e-3
    """λ over the mean second moment of x."""


@router_from_activations(
    "static",
    summary="always the experts of largest mean output energy",
    paper="baseline",
    params=StaticParams,
)
def router(
    activations: LayerActivations, experts_EM: Tensor, params: StaticParams, rng: torch.Generator
) -> Tensor:
    energy_E = activations.energy()[experts_EM.to(activations.x_TD.device)].sum(1)
    rank_E = energy_E.argsort().argsort().float() / len(energy_E)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for x_tD in activations.x_TD.split(4096):
            yield x_tD, x_tD.new_ones(len(x_tD), 1)

    return rank_E.cpu()[:, None] * ridge(pairs(), params.strength).cpu()
