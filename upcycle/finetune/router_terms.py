"""The losses of routers that a run asks for, over all of its blocks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from upcycle.core.binding import Bound
from upcycle.core.rng import generator
from upcycle.finetune.data import Data
from upcycle.finetune.router_losses.base import RouterLoss, Seen
from upcycle.finetune.routers import Routed, Scale, of_spread, untempered
from upcycle.models.blocks import MoEBlock

Means = dict[str, list[Tensor]]
"""By loss, of each block, the mean of its statistic over a step."""


@dataclass(frozen=True)
class Term:
    """A loss with its parameters."""

    bound: Bound[RouterLoss]
    weight: float

    def mean(self, seen: Seen) -> Tensor | None:
        """What the loss is a function of, over a micro-batch; None if it is of `seen` itself."""
        statistic = self.bound.method.statistic
        return None if statistic is None else statistic(seen, self.bound.params)

    def loss(self, given: Seen | Tensor) -> Tensor:
        value: Tensor = self.bound.run(given, self.bound.params)
        return value

    def part(self, step: Tensor, part: Tensor) -> Tensor:
        """The loss of a step's mean, with a micro-batch's part of its gradient: weighed by the
        parts' shares of the step, gradients add up to the step's."""
        with torch.enable_grad():
            at = step.detach().requires_grad_()
            loss = self.loss(at)
            (slope,) = torch.autograd.grad(loss, at)
        return loss.detach() + (slope * (part - part.detach())).sum()


@dataclass
class RouterTerms:
    """The losses of a run's routers, and the coefficients of those that have one per block."""

    terms: dict[str, Term]
    blocks: list[MoEBlock]
    scales: list[Scale]
    score: Callable[[Tensor], Tensor]
    texts: int
    seed: int
    coefficients: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, term in self.terms.items():
            if (schedule := term.bound.method.schedule) is not None:
                self.coefficients[name] = [schedule.first(term.bound.params)] * len(self.blocks)

    @property
    def of_steps(self) -> bool:
        """Whether a loss is of all of a step's tokens together."""
        return any(term.bound.method.statistic is not None for term in self.terms.values())

    @property
    def weights(self) -> dict[str, float]:
        return {name: term.weight for name, term in self.terms.items()}

    def seen(self, routed: Sequence[Routed], batch: Data, step: int) -> list[Seen]:
        """What the blocks did with a micro-batch; nothing, if no loss looks at it."""
        routed = routed if self.terms else ()
        return [self._seen(place, each, batch, step) for place, each in enumerate(routed)]

    def _seen(self, place: int, routed: Routed, batch: Data, step: int) -> Seen:
        z_TE, scale = routed.logits_TE, self.scales[place]
        logits_TE = untempered(z_TE, scale)
        spread, noise_TE = scale.spread or 1.0, routed.noise_TE
        clean_TE = of_spread(z_TE, spread)
        # Of a tempered router, the logits are in units of their spread already.
        unit = spread / scale.router
        return Seen(
            logits_TE=logits_TE,
            scores_TE=self.score(logits_TE),
            weighing_TE=self.score(logits_TE if noise_TE is None else logits_TE + unit * noise_TE),
            chosen_TK=routed.chosen_TK,
            mask_T=batch.mask_BL.flatten().to(z_TE.device),
            text_T=batch.text_B.repeat_interleave(batch.mask_BL.shape[1]).to(z_TE.device),
            texts=self.texts,
            block=self.blocks[place],
            scale=scale,
            rng=generator(self.seed, f"losses of router {place}", step),
            clean_TE=clean_TE,
            noisy_TE=None if noise_TE is None else clean_TE + noise_TE,
            noise=routed.noise,
        )

    def means(self, seen: Sequence[Seen]) -> Means:
        """Of a micro-batch alone."""
        found = {name: [term.mean(each) for each in seen] for name, term in self.terms.items()}
        return {
            name: [mean for mean in means if mean is not None]
            for name, means in found.items()
            if self.terms[name].bound.method.statistic is not None
        }

    def losses(self, seen: Sequence[Seen], step: Means | None) -> Iterator[tuple[str, Tensor]]:
        """Each loss's mean over blocks, unweighted.

        Args:
            step: of all of the step; None where the micro-batch is all of it.
        """
        means = self.means(seen)
        for name, term in self.terms.items():
            if name not in means:
                each = [term.loss(one) for one in seen]
            elif step is None:
                each = [term.loss(mean) for mean in means[name]]
            else:
                each = [term.part(*pair) for pair in zip(step[name], means[name], strict=True)]
            factors = self.coefficients.get(name, [1.0] * len(each))
            yield name, torch.stack([f * e for f, e in zip(factors, each, strict=True)]).mean()

    def adapt(self, counts: Sequence[Tensor]) -> None:
        """Let the coefficients follow how often each block's experts were selected in a step."""
        for name, former in self.coefficients.items():
            bound = self.terms[name].bound
            assert bound.method.schedule is not None
            self.coefficients[name] = [
                bound.method.schedule.then(coefficient, count_E, bound.params)
                for coefficient, count_E in zip(former, counts, strict=True)
            ]
