"""Losses of routers: pure functions of what a block's router did with the tokens of a step.

A loss that is a mean over tokens is a function of `Seen` alone. One that is of the whole step, as
how evenly its tokens use the experts, names a statistic, a mean over tokens [...], and is a
function of its mean over the step: its gradient is then exact, however the step's sequences are
dealt out to micro-batches and processes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, Unpack

import torch
from torch import Tensor

from upcycle.core.registry import About, Method, Params, Registry, registering
from upcycle.finetune.routers import Scale
from upcycle.models.blocks import MoEBlock

P = TypeVar("P", bound=Params, contravariant=True)


@dataclass(frozen=True)
class Seen:
    """What a block's router did with T tokens, of which it selects K of E experts each."""

    logits_TE: Tensor
    """Of ordinary spread, whatever the router's temperature; without noise."""
    scores_TE: Tensor
    """What the architecture makes of them: a softmax, or sigmoids."""
    weighing_TE: Tensor
    """The same by which selected experts count: with the noise that selected, if any did."""
    chosen_TK: Tensor
    mask_T: Tensor
    """Which tokens count, the rest being padding."""
    text_T: Tensor
    """Places in `data` of the texts that the tokens come from."""
    texts: int
    """How many there are."""
    block: MoEBlock
    scale: Scale
    rng: torch.Generator
    """The same for all tokens of a step."""
    clean_TE: Tensor
    """Logits in units of their spread before the first step."""
    noisy_TE: Tensor | None = None
    """The same with the noise that selected, if any did."""
    noise: float = 0.0
    """Its standard deviation."""

    def mean(self, values: Tensor) -> Tensor:
        """Of values [T, ...] over the tokens that count."""
        weight_T = self.mask_T.to(values) / self.mask_T.sum()
        mean: Tensor = torch.tensordot(weight_T, values, dims=1)
        return mean

    @property
    def shares_TE(self) -> Tensor:
        """Scores that add up to 1 for each token."""
        return self.scores_TE / self.scores_TE.sum(-1, keepdim=True)

    @property
    def load_E(self) -> Tensor:
        """The share of the selections that fall on each expert."""
        chosen = self.chosen_TK[self.mask_T].flatten()
        count_E = chosen.bincount(minlength=self.scores_TE.shape[1])
        return count_E / count_E.sum()


@dataclass(frozen=True)
class Facts:
    """What is known of a model and a run before the first step."""

    score: Literal["softmax", "sigmoid"]
    experts: int
    top_k: int
    texts: int
    parts: bool
    """Whether experts are parts of an FFN, whose outputs add up, or each stand for a whole one."""
    sharded: bool
    """Whether processes hold parts of the weights."""


class Statistic(Protocol[P]):
    def __call__(self, seen: Seen, params: P) -> Tensor: ...


class Loss(Protocol[P]):
    """A number, from what was seen of a micro-batch; or, where there is a statistic, from its mean
    over the step."""

    def __call__(self, seen: Any, params: P) -> Tensor: ...


@dataclass(frozen=True)
class Schedule:
    """How the coefficient of a loss changes, layer by layer."""

    first: Callable[[Any], float]
    """From the parameters, the one of the first step."""
    then: Callable[[float, Tensor, Any], float]
    """The next one, from the former one, how often each expert was selected in a step [E], and the
    parameters."""


class Refusal(Protocol[P]):
    """Why the loss can't work, or nothing."""

    def __call__(self, facts: Facts, params: P) -> str: ...


def _nothing(facts: Facts, params: Params) -> str:
    return ""


@dataclass(frozen=True)
class RouterLoss(Method[Loss[Any]]):
    statistic: Statistic[Any] | None = None
    schedule: Schedule | None = None
    refusal: Refusal[Any] = _nothing


ROUTER_LOSSES: Registry[RouterLoss] = Registry("router loss")


def router_loss(
    name: str,
    *,
    statistic: Statistic[Any] | None = None,
    schedule: Schedule | None = None,
    refusal: Refusal[Any] = _nothing,
    **about: Unpack[About],
) -> Callable[[Callable[[Any, P], Tensor]], Callable[[Any, P], Tensor]]:
    """Register a loss of routers.

    Args:
        statistic: what it is a function of, in place of `Seen`.
        schedule: changes the loss's coefficient after each step.
        refusal: says of a model where the loss has no effect.
    """
    fields = {"needs_activations": False, "statistic": statistic, "schedule": schedule}
    return registering(ROUTER_LOSSES, RouterLoss, name=name, refusal=refusal, **fields, **about)
