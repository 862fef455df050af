"""Fit: what gradient descent learns of one layer, of the experts and the router that were made.

A fit sees what the layer's routed neurons do on calibration tokens. The router comes with logits
that spread by 1 over experts, and its scale is free again afterwards. An expert that is on counts
1: what the target makes of it is left to the compensation, which comes later.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, TypeVar, Unpack

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from upcycle.conversion.fit.loop import Tell
from upcycle.core.registry import About, Method, Params, Registry, registering
from upcycle.core.transport import straight_through
from upcycle.core.types import DenseFFN, LayerActivations

P = TypeVar("P", bound=Params, contravariant=True)
Part = Literal["split", "router", "weights"]
Rate = Annotated[float, Field(gt=0, le=100)]


class FitParams(Params):
    """Of a fit that learns."""

    epochs: PositiveInt = 4
    """Passes over the calibration tokens."""
    budget: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of a layer's relative error on tokens held out: upcycle.json says the smallest k that keeps
    to it, layer by layer. The model has one k all the same."""


@dataclass(frozen=True)
class Experts:
    """A layer's routed experts, and what chooses among them."""

    ffn: DenseFFN
    """Of the routed neurons."""
    experts_EM: Tensor
    """Which of these each expert holds."""
    router_ED: Tensor


@dataclass(frozen=True)
class Lesson:
    """What a fit learns from."""

    activations: LayerActivations
    """Of the routed neurons on whole batches of tokens, in an order drawn at random."""
    weight_T: Tensor
    """How much an error on each token counts."""
    unit: float
    """Mean over tokens of what all routed neurons put out, w |y|²."""
    top_k: int
    size: int
    """Tokens of a batch."""
    rng: torch.Generator
    tell: Tell = lambda done, steps: None

    def steps(self, epochs: int) -> int:
        return epochs * (len(self.weight_T) // self.size)

    def batches(self, epochs: int, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Tuples (x [t, D], h [t, F], weight [t]) of `size` tokens, with the same tokens' rows of
        what is given beside; all tokens in each epoch."""
        for _ in range(epochs):
            chunks = self.activations.chunks(self.weight_T, *beside)
            left = next(chunks)
            for rows in chunks:
                yield from self._whole(left)
                done = len(left[0]) // self.size * self.size
                left = tuple(torch.cat([a[done:], b]) for a, b in zip(left, rows, strict=True))
            yield from self._whole(left)

    def _whole(self, rows: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
        """The whole batches of these rows."""
        for end in range(self.size, len(rows[0]) + 1, self.size):
            yield tuple(row[end - self.size : end] for row in rows)


def membership(experts_EM: Tensor, num_neurons: int) -> Tensor:
    """1 where an expert holds a neuron, [E, F], else 0."""
    held_EF = torch.zeros(len(experts_EM), num_neurons)
    return held_EF.scatter_(1, experts_EM.cpu(), 1)


def hard_top_k(logits_TE: Tensor, top_k: int) -> Tensor:
    """1 for the experts of the largest logits, [T, E], else 0."""
    return torch.zeros_like(logits_TE).scatter(1, logits_TE.topk(top_k).indices, 1)


def straight_through_top_k(logits_TE: Tensor, top_k: int) -> Tensor:
    """`hard_top_k` with the gradient of softmax."""
    return straight_through(hard_top_k(logits_TE.detach(), top_k), logits_TE.softmax(1))


class Learn(Protocol[P]):
    def __call__(self, experts: Experts, lesson: Lesson, params: P) -> Experts: ...


Run = Callable[[Experts, Lesson, Params], Experts]


@dataclass(frozen=True)
class Fit(Method[Run]):
    learns: tuple[Part, ...] = ()
    guarded: bool = True
    """Whether what it learns is kept only where it lessens the layer's error."""

    @property
    def refits(self) -> tuple[str, ...]:
        """The matrices of a `DenseFFN` that it changes."""
        return ("gate_FD", "up_FD", "down_DF") if "weights" in self.learns else ()


FITS: Registry[Fit] = Registry("fit")


def fit(
    name: str, *, learns: tuple[Part, ...], guarded: bool = True, **about: Unpack[About]
) -> Callable[[Learn[P]], Learn[P]]:
    """Register a function that returns other experts and leaves those that it gets alone.

    Args:
        learns: what it changes of them.
        guarded: whether they are kept only where they lessen the layer's error; else its aim is
            another.
    """
    fields = {"needs_activations": bool(learns), "learns": learns, "guarded": guarded}
    return registering(FITS, Fit, name=name, **fields, **about)
