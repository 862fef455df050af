"""LTE's separation: sigmoid scores keep away from the threshold that switches experts on.

Zheng et al., NeurIPS 2024, arXiv:2402.06126, Learn To be Efficient: the mean of 1 / (G − τ)² over
tokens and experts. Closer to τ than `nearest` it rises along its tangent, so that its gradient
stays finite. Departures: a native class switches on the best K, not what exceeds τ, so LTE's loss
of scores themselves, which sets how many experts are on, is left out.
"""

import torch
from pydantic import Field
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.finetune.router_losses.base import Facts, Seen, router_loss


class Separation(Params):
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """τ, of scores."""
    nearest: float = Field(default=0.1, gt=0, lt=1)
    """The distance from which the loss rises no steeper."""


def of_softmax(facts: Facts, params: Separation) -> str:
    if facts.score == "sigmoid":
        return ""
    return "its scores are a softmax, of which no threshold switches experts on: use glm4_moe"


@router_loss(
    "separation",
    summary="sigmoid scores keep away from a threshold",
    paper="arXiv:2402.06126",
    params=Separation,
    refusal=of_softmax,
)
def separation(seen: Seen, params: Separation) -> Tensor:
    return seen.mean(repulsion(seen.scores_TE, params).mean(-1))


def repulsion(scores: Tensor, params: Separation) -> Tensor:
    """1 / (G − τ)², and its tangent where it would be too steep; on τ itself it points up."""
    off = scores - params.threshold
    distance = torch.where(off >= 0, off, -off)
    far = distance.clamp(min=params.nearest)
    return far**-2 + 2 * params.nearest**-3 * (far - distance)
