"""Gating of training: which experts a token gets while a model learns, and what they count.

It changes the forward pass of training steps alone. Validation, and what is saved, route as the
class does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, Unpack

import torch
from torch import Tensor

from upcycle.core.binding import Bound
from upcycle.core.registry import About, Method, Params, Registry, registering
from upcycle.core.rng import generator
from upcycle.finetune.routers import all_weights, expert_scale, renormalises
from upcycle.models.blocks import MoEBlock

P = TypeVar("P", bound=Params, contravariant=True)


@dataclass(frozen=True)
class Pass:
    """Which sequences of which step run through the model."""

    seed: int
    step: int
    progress: float
    """The share of all steps that are done."""
    rows: Sequence[int]
    """The sequences' places in the step."""

    def numbers(self, block: int, tokens: int) -> "Numbers":
        """Random ones for a block's tokens. They follow from the sequence's place in the step: no
        micro-batch, process or second run of a checkpointed layer changes them."""
        stages = [f"gating of {block} in sequence {row}" for row in self.rows]
        rngs = [generator(self.seed, stage, self.step) for stage in stages]
        return Numbers(rngs, tokens // len(rngs))


@dataclass(frozen=True)
class Numbers:
    """Random numbers of the tokens of some sequences; other ones at every call."""

    rngs: list[torch.Generator]
    length: int

    def uniform_like(self, like_TC: Tensor) -> Tensor:
        """Between 0 and 1, of as many columns as `like_TC`."""
        return self._drawn(torch.rand, like_TC)

    def normal_like(self, like_TC: Tensor) -> Tensor:
        return self._drawn(torch.randn, like_TC)

    def _drawn(self, draw: Callable[..., Tensor], like_TC: Tensor) -> Tensor:
        shape = self.length, like_TC.shape[1]
        return torch.cat([draw(shape, generator=rng) for rng in self.rngs]).to(like_TC)


@dataclass(frozen=True)
class Gates:
    """The experts that T tokens run through, and what these count; K each, or more."""

    chosen_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor
    """By which they were selected."""
    selected_TK: Tensor | None = None
    """Those of them that count as selected, if not all do."""
    noise_TE: Tensor | None = None
    """What of these was added, in units of the logits' first spread."""
    noise: float = 0.0
    """Its standard deviation."""


@dataclass(frozen=True)
class Route:
    """How a block's class would route its tokens, and by which rule."""

    block: MoEBlock
    score: Callable[[Tensor], Tensor]
    logits_TE: Tensor
    chosen_TK: Tensor
    weights_TK: Tensor
    spread: float
    """Of a token's logits, before the first step."""
    parts: bool
    """Whether experts are parts of an FFN, whose outputs add up, or each stand for a whole one."""
    progress: float
    numbers: Numbers

    @property
    def own(self) -> Gates:
        """As the class has it."""
        return Gates(self.chosen_TK, self.weights_TK, self.logits_TE)

    def gates(self, logits_TE: Tensor) -> Gates:
        """What the class would select and weigh by other logits; by one of -inf, never."""
        scores_TE = self.score(logits_TE)
        allowed_TE = _allowed(
            self.block, scores_TE.masked_fill(logits_TE == -torch.inf, -torch.inf)
        )
        chosen_TK = allowed_TE.topk(self.chosen_TK.shape[1], dim=-1).indices
        kept_TK = scores_TE.gather(1, chosen_TK)
        scale_E = expert_scale(self.block, scores_TE)
        sum_T1 = (self.weights_TK / scale_E[self.chosen_TK]).sum(-1, keepdim=True).detach()
        if renormalises(self.block.router):
            weights_TK = kept_TK / kept_TK.sum(-1, keepdim=True) * sum_T1
        else:
            own_T1 = self.score(self.logits_TE).gather(1, self.chosen_TK).sum(-1, keepdim=True)
            weights_TK = kept_TK * (sum_T1 / own_T1.detach())
        return Gates(chosen_TK, weights_TK * scale_E[chosen_TK], logits_TE)

    def all_weights(self, left: float = 1.0) -> Tensor:
        """What each expert would count [T, E] if all ran; those not selected this share of it."""
        scores_TE = self.score(self.logits_TE)
        weights_TE = all_weights(self.block, scores_TE, self.chosen_TK, self.weights_TK)
        weights_TE = weights_TE * torch.full_like(weights_TE, left).scatter(1, self.chosen_TK, 1.0)
        if self.parts:
            return weights_TE
        sum_T1 = weights_TE.sum(-1, keepdim=True)
        sum_T1 = sum_T1 if renormalises(self.block.router) else sum_T1.detach()
        return weights_TE * (self.weights_TK.sum(-1, keepdim=True).detach() / sum_T1)


def _allowed(block: MoEBlock, scores_TE: Tensor) -> Tensor:
    """By what the class selects: scores with its bias, -inf outside the best groups."""
    if block.selection_bias is not None:
        scores_TE = scores_TE + block.selection_bias.to(scores_TE)
    groups = getattr(block.router, "num_group", 1)
    if groups == 1:
        return scores_TE
    scores_TGS = scores_TE.unflatten(1, (groups, -1))
    best_TG = scores_TGS.topk(2, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(best_TG, dtype=torch.bool)
    kept_TG.scatter_(1, best_TG.topk(block.router.topk_group, dim=-1).indices, True)
    allowed_TE: Tensor = scores_TGS.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)
    return allowed_TE


class Gate(Protocol[P]):
    """The gates of a block's tokens."""

    def __call__(self, route: Route, params: P) -> Gates: ...


@dataclass(frozen=True)
class Gating(Method[Gate[Any]]):
    runs_own: bool = True
    """Whether a token's experts are those that it selects by the gates' logits, of which
    `dense_router_gradient` can tell what the others would have done."""


GATINGS: Registry[Gating] = Registry("gating")


def gating(
    name: str, *, runs_own: bool = True, **about: Unpack[About]
) -> Callable[[Gate[P]], Gate[P]]:
    """Register how training routes in place of the class."""
    fields = {"needs_activations": False, "runs_own": runs_own}
    return registering(GATINGS, Gating, name=name, **fields, **about)


@dataclass
class Gater:
    """A gating with its parameters, in the passes of training."""

    bound: Bound[Gating]
    blocks: list[MoEBlock]
    spreads: list[float]
    score: Callable[[Tensor], Tensor]
    parts: bool
    """As in `Route`."""
    now: Pass | None = None
    """None before the first step."""

    def __call__(
        self, place: int, logits_TE: Tensor, chosen_TK: Tensor, weights_TK: Tensor
    ) -> Gates:
        """The gates of a block, given what its class routes."""
        assert self.now is not None
        route = Route(
            block=self.blocks[place],
            score=self.score,
            logits_TE=logits_TE,
            chosen_TK=chosen_TK,
            weights_TK=weights_TK,
            spread=self.spreads[place],
            parts=self.parts,
            progress=self.now.progress,
            numbers=self.now.numbers(place, len(logits_TE)),
        )
        gates: Gates = self.bound.run(route, self.bound.params)
        return gates
