"""Expert dropout: each expert is out of a token's reach with some probability.

σ-MoE, Csordás et al., EMNLP Findings 2023, arXiv:2310.10837: made for sigmoid scores that are not
renormalised (glm4_moe), and of use wherever the same experts always win. Departure: a token that
all experts are dropped for keeps them all.
"""

import torch
from pydantic import Field

from upcycle.core.registry import Params
from upcycle.finetune.gating.base import Gates, Route, gating


class Dropout(Params):
    drop: float = Field(default=0.1, gt=0, lt=1)
    """The probability that an expert is out of a token's reach."""


@gating(
    "expert_dropout",
    summary="each expert is out of a token's reach with some probability",
    paper="arXiv:2310.10837",
    params=Dropout,
)
def gate(route: Route, params: Dropout) -> Gates:
    gone_TE = route.numbers.uniform_like(route.logits_TE) < params.drop
    gone_TE &= ~gone_TE.all(-1, keepdim=True)
    return route.gates(route.logits_TE.masked_fill(gone_TE, -torch.inf))
