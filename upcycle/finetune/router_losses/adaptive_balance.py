"""Skywork-MoE's balance: a layer's coefficient follows how many of its selections would be dropped.

Wei et al. 2024, arXiv:2406.06563: after each step α ← β α + (1 − β) min(ξ d, α_max), with d the
share of a layer's selections beyond what the experts have room for. Departures: nothing is dropped
here, so d is what would be, at the capacity that is given; α begins at α_max.
"""

from pydantic import Field, PositiveFloat
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.finetune.router_losses.balance import load_and_scores, unevenness
from upcycle.finetune.router_losses.base import Schedule, router_loss


class Adaptive(Params):
    rate: PositiveFloat = 0.2
    """ξ: the coefficient that a share of dropped selections asks for, over that share."""
    ceiling: PositiveFloat = 0.01
    """α_max: the largest coefficient."""
    memory: float = Field(default=0.99, ge=0, lt=1)
    """β: what is left of a coefficient after a step."""
    capacity: PositiveFloat = 1.0
    """Selections that an expert has room for, over the fair share."""


def next_coefficient(coefficient: float, count_E: Tensor, params: Adaptive) -> float:
    wanted = min(params.rate * dropped(count_E, params.capacity), params.ceiling)
    return params.memory * coefficient + (1 - params.memory) * wanted


def dropped(count_E: Tensor, capacity: float) -> float:
    """The share of selections beyond each expert's capacity."""
    count_E = count_E.double()
    return float((count_E - capacity * count_E.mean()).clamp(min=0).sum() / count_E.sum())


@router_loss(
    "adaptive_balance",
    summary="balance, the more of it the more selections of a layer would be dropped",
    paper="arXiv:2406.06563",
    params=Adaptive,
    statistic=load_and_scores,
    schedule=Schedule(lambda params: params.ceiling, next_coefficient),
)
def loss(load_and_score_2E: Tensor, params: Adaptive) -> Tensor:
    return unevenness(load_and_score_2E)
