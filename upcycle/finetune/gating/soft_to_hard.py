"""Soft to hard: at first all experts run and count their scores; those not selected fade.

Zheng et al., NeurIPS 2024, "Learn To be Efficient", arXiv:2402.06126, trains softly, then with the
selected experts alone; its two stages are `full` = `until`. Every router then learns from all
experts, at the cost of all of them. Where experts are no parts of an FFN, as copies, all together
count as much as the selected ones do alone. Departures: the best K are selected, not what exceeds a
threshold, and routers go on learning in the second stage.
"""

import torch
from pydantic import Field, model_validator

from upcycle.core.registry import Params
from upcycle.finetune.gating.base import Gates, Route, gating


class Fade(Params):
    full: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps in which experts that are not selected count their full scores."""
    until: float = Field(default=0.5, gt=0, le=1)
    """Share of the steps after which they do not run; between the two they fade."""

    @model_validator(mode="after")
    def _in_order(self) -> "Fade":
        if self.full > self.until:
            raise ValueError("full must not be above until")
        return self

    def left(self, progress: float) -> float:
        """What of a score is left to an expert that is not selected, after a share of the steps."""
        if progress >= self.until:
            return 0.0
        return min(1.0, (self.until - progress) / max(self.until - self.full, 1e-9))


@gating(
    "soft_to_hard",
    summary="at first all experts run, those not selected fade",
    paper="arXiv:2402.06126",
    params=Fade,
    runs_own=False,
)
def gate(route: Route, params: Fade) -> Gates:
    left = params.left(route.progress)
    if not left:
        return route.own
    weights_TE = route.all_weights(left)
    every_TE = torch.arange(weights_TE.shape[1]).to(route.chosen_TK).expand_as(weights_TE)
    return Gates(every_TE, weights_TE, route.logits_TE, selected_TK=route.chosen_TK)
