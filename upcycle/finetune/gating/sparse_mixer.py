"""SparseMixer: experts are sampled, and routers learn by a gradient that is meant for samples.

Liu et al. 2024, GRIN, arXiv:2409.12136 (SparseMixer-v2), as in transformers' phimoe: logits too far
below the best are out; one of the others is sampled by its probability π and counts π, or a third
of it (Heun's third-order method: unless it is the best, three times in four), while its gradient is
that of π; then the same of the rest, K times. Departures: logits are taken in units of their first
spread; weights are multiplied by the mean weight that the class gives a selected expert, so that
they are of its unit. Outside of training the class weighs, not π.
"""

import torch
from pydantic import Field
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.finetune.gating.base import Gates, Numbers, Route, gating
from upcycle.finetune.routers import of_spread

BEST_ANYWAY = 0.25
"""Of samples that are not the best, the share that counts in full."""


class Jitter(Params):
    jitter: float = Field(default=0.01, gt=0, lt=1)
    """Half the distance below the best, as a share of the larger of the two logits, from which an
    expert is out."""


@gating(
    "sparse_mixer",
    summary="experts are sampled, and routers get a gradient that is meant for samples",
    paper="arXiv:2409.12136",
    params=Jitter,
    runs_own=False,
)
def gate(route: Route, params: Jitter) -> Gates:
    logits_TE, slots = of_spread(route.logits_TE, route.spread), []
    left_TE = torch.ones_like(logits_TE, dtype=torch.bool)
    for _ in range(route.chosen_TK.shape[1]):
        chosen_T1, weight_T1 = _slot(logits_TE, left_TE, params.jitter, route.numbers)
        left_TE = left_TE.scatter(1, chosen_T1, False)
        slots.append((chosen_T1, weight_T1))
    chosen_TK, weights_TK = (torch.cat(each, dim=1) for each in zip(*slots, strict=True))
    unit_T1 = route.weights_TK.mean(-1, keepdim=True).detach()
    return Gates(chosen_TK, weights_TK * unit_T1, route.logits_TE)


def _slot(
    logits_TE: Tensor, left_TE: Tensor, jitter: float, numbers: Numbers
) -> tuple[Tensor, Tensor]:
    """One expert of those that are left, and its weight, [T, 1] each."""
    share_TE = near_shares(logits_TE, left_TE, jitter)
    with torch.no_grad():
        gumbel_TE = -numbers.uniform_like(logits_TE).log().neg().log()
        chosen_T1 = (share_TE.log() + gumbel_TE).argmax(-1, keepdim=True)
        best_T1 = share_TE.argmax(-1, keepdim=True)
        lucky_T1 = numbers.uniform_like(best_T1.to(logits_TE)) < BEST_ANYWAY
        counts_T1 = torch.where((chosen_T1 == best_T1) | lucky_T1, 1.0, 1 / 3)
    weight_T1 = share_TE.gather(1, chosen_T1)
    return chosen_T1, weight_T1 + (counts_T1 * weight_T1 - weight_T1).detach()


def near_shares(logits_TE: Tensor, left_TE: Tensor, jitter: float) -> Tensor:
    """The softmax of the logits that are left and near the best of them; 0 elsewhere."""
    logits_TE = logits_TE.masked_fill(~left_TE, -torch.inf)
    with torch.no_grad():
        best_T1 = logits_TE.amax(-1, keepdim=True)
        gap_TE = (best_T1 - logits_TE) / torch.maximum(logits_TE.abs(), best_T1)
        # Of -inf the gap is no number.
        near_TE = left_TE & ~(gap_TE > 2 * jitter)
    return logits_TE.masked_fill(~near_TE, -torch.inf).softmax(-1)
