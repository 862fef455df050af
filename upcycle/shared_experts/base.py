"""Shared experts: which neurons are on for every token."""

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

from torch import Tensor

from upcycle.registry import Method, Params, Registry
from upcycle.types import LayerActivations

P = TypeVar("P", bound=Params, contravariant=True)


class Score(Protocol[P]):
    """How much each neuron deserves to be shared, [F]; the largest are taken."""

    def __call__(self, activations: LayerActivations, params: P) -> Tensor: ...


Run = Callable[[LayerActivations, Params], Tensor]
SHARED: Registry[Method[Run]] = Registry("shared-expert rule")


def shared_by(
    name: str, *, summary: str, paper: str, params: type[Params] = Params
) -> Callable[[Score[P]], Score[P]]:
    """Register a rule that scores neurons by what they do on the calibration tokens."""

    def register(function: Score[P]) -> Score[P]:
        SHARED.add(
            name, Method(name, summary, paper, params, cast(Run, function), needs_activations=True)
        )
        return function

    return register
