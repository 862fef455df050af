"""A layer learns, by a fit, from most of its tokens; the others say what that is worth.

What was learned is kept if it lessens the layer's error on the tokens that it was not learned from,
unless the fit aims at something else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from upcycle.conversion.fit.base import Experts, Fit, FitParams, Lesson
from upcycle.conversion.fit.loop import BATCH, Tell
from upcycle.core.registry import Params
from upcycle.core.types import CHUNK_ELEMENTS, LayerActivations
from upcycle.models.record.conversion import FitPart

HELD = 16
"""Of so many batches one is held out, with the tokens that fill no batch; at least one."""


def idle(tokens: int, top_k: int, experts: int) -> str:
    """Why nothing can be learned of so many tokens, in words; empty if something can."""
    if top_k == experts:
        return "all experts are on, so that there is nothing to choose"
    if tokens < 2 * BATCH:
        return f"{tokens:,} tokens are less than the {2 * BATCH:,} that it takes to learn and test"
    return ""


def learn(
    fit: Fit,
    params: Params,
    experts: Experts,
    activations: LayerActivations,
    weight_T: Tensor,
    top_k: int,
    rng: torch.Generator,
    tell: Tell,
) -> tuple[Experts, FitPart | None]:
    """What a fit makes of experts, and what that is worth; the same experts, and nothing, where
    it learns nothing; see `idle`.

    Args:
        experts: of a router whose logits spread by 1.
        activations: of the routed neurons.
        weight_T: how much an error on each token counts.
    """
    tokens, batches = len(weight_T), len(weight_T) // BATCH
    if not isinstance(params, FitParams) or idle(tokens, top_k, len(experts.router_ED)):
        return experts, None
    order_T = torch.randperm(tokens, generator=rng).to(weight_T.device)
    taught = (batches - max(1, batches // HELD)) * BATCH
    ours_T, held_T = order_T[:taught], order_T[taught:]
    held = Held(activations.on(held_T), weight_T[held_T])
    unit = held.unit / len(held_T)
    before_E = held.errors(experts)
    before = before_E[top_k - 1]
    if not before > 0:
        return experts, None
    lesson = Lesson(activations.on(ours_T), weight_T[ours_T], unit, top_k, BATCH, rng, tell)
    learned = fit.run(experts, lesson, params)
    after_E = held.errors(learned)
    kept = not fit.guarded or after_E[top_k - 1] < before
    errors_E = after_E if kept else before_E
    met = [k for k, error in enumerate(errors_E, 1) if error <= params.budget]
    part = FitPart(
        error_before=before,
        error_after=after_E[top_k - 1],
        kept=kept,
        budget=params.budget,
        smallest_k=min(met, default=None),
    )
    return learned if kept else experts, part


def said(parts: Sequence[FitPart], top_k: int) -> str:
    """What the layers have learned, in a sentence or two; nothing if none has."""
    if not parts:
        return ""
    before = sum(part.error_before for part in parts) / len(parts)
    after = sum(part.error_after if part.kept else part.error_before for part in parts) / len(parts)
    left = sum(not part.kept for part in parts)
    stay = f" ({left} of {len(parts)} layers stay as they were)" if left else ""
    return (
        f"On tokens that it did not see, it brings the layers' error from {before:.3f} to "
        f"{after:.3f} of what their experts put out{stay}. {_needed(parts)}; all have {top_k}."
    )


def _needed(parts: Sequence[FitPart]) -> str:
    """How many experts layers would need."""
    budget, wanted = parts[0].budget, [part.smallest_k for part in parts if part.smallest_k]
    if not wanted:
        return f"With no number of experts is it within {budget:g}"
    least, most = min(wanted), max(wanted)
    some = f", in {len(wanted)} of {len(parts)} layers" if len(wanted) < len(parts) else ""
    experts = str(least) if least == most else f"{least} to {most}"
    return f"To be within {budget:g}, they would need {experts} experts per token{some}"


@dataclass(frozen=True)
class Held:
    """Tokens that nothing is learned from."""

    activations: LayerActivations
    weight_T: Tensor

    @cached_property
    def unit(self) -> float:
        """Σ w |y|², of what all routed neurons put out."""
        down_DF = self.activations.ffn.down_DF
        chunks = self.activations.chunks(self.weight_T)
        return sum(float(w_t @ (h_tF @ down_DF.T).square().sum(1)) for _, h_tF, w_t in chunks)

    def errors(self, experts: Experts) -> list[float]:
        """Σ w |y - ŷ|² / Σ w |y|² with 1, 2, … and all of the experts on."""
        dense, ffn = self.activations.ffn, experts.ffn
        size = max(1, CHUNK_ELEMENTS // (len(experts.experts_EM) * ffn.hidden_size))
        lost_E = torch.zeros(len(experts.experts_EM), dtype=torch.float64)
        for rows in self.activations.chunks(self.weight_T):
            for x_tD, h_tF, w_t in zip(*(row.split(size) for row in rows), strict=True):
                own_tF = h_tF if ffn is dense else ffn.hidden(x_tD)
                y_tD = h_tF @ dense.down_DF.T
                wrong_tE = (_growing(experts, x_tD, own_tF) - y_tD[:, None]).square().sum(2)
                lost_E += (w_t @ wrong_tE).cpu().double()
        errors: list[float] = (lost_E / self.unit).tolist()
        return errors


def _growing(experts: Experts, x_TD: Tensor, h_TF: Tensor) -> Tensor:
    """What the first 1, 2, … and all experts put out by a token's own order of them, [T, E, D]."""
    down_DF = experts.ffn.down_DF
    parts = [h_TF[:, own_M] @ down_DF[:, own_M].T for own_M in experts.experts_EM]
    order_TE = (x_TD @ experts.router_ED.T).argsort(dim=1, descending=True, stable=True)
    places_TED = order_TE[:, :, None].expand(-1, -1, len(down_DF))
    return torch.stack(parts, 1).gather(1, places_TED).cumsum(1)
