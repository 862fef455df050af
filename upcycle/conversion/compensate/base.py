"""Compensation: what the neurons that are on do to stand in for those that are off."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar, Unpack

from torch import Tensor

from upcycle.core.registry import About, Method, Params, Registry, registering
from upcycle.core.types import DenseFFN, LayerActivations, Selection

P = TypeVar("P", bound=Params, contravariant=True)


class Compensate(Protocol[P]):
    """New weights for all neurons, given which of them are on for a token, what they should put out
    for it, and how much an error on it counts."""

    def __call__(
        self,
        activations: LayerActivations,
        selection: Selection,
        y_TD: Tensor,
        weight_T: Tensor,
        params: P,
    ) -> DenseFFN: ...


Run = Callable[[LayerActivations, Selection, Tensor, Tensor, Params], DenseFFN]


@dataclass(frozen=True)
class Compensation(Method[Run]):
    refits: tuple[str, ...] = ()
    """Which matrices of a `DenseFFN` it changes."""
    descends_from: int = 0
    """The fewest tokens by which it takes steps; 0 for one that takes none."""


COMPENSATIONS: Registry[Compensation] = Registry("compensation")


def compensation(
    name: str, *, refits: tuple[str, ...] = (), descends_from: int = 0, **about: Unpack[About]
) -> Callable[[Compensate[P]], Compensate[P]]:
    """Register a function that returns an FFN and leaves its input alone.

    Args:
        refits: which matrices of the FFN it changes.
        descends_from: the fewest tokens by which it takes steps, if it does.
    """
    fields = {"needs_activations": bool(refits), "refits": refits, "descends_from": descends_from}
    return registering(COMPENSATIONS, Compensation, name=name, **fields, **about)
