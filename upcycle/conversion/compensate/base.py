"""Compensation: what the neurons that are on do to stand in for those that are off."""

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

from torch import Tensor

from upcycle.core.registry import Method, Params, Registry
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
COMPENSATIONS: Registry[Method[Run]] = Registry("compensation")


def compensation(
    name: str,
    *,
    summary: str,
    paper: str,
    params: type[Params] = Params,
    refits: tuple[str, ...] = (),
) -> Callable[[Compensate[P]], Compensate[P]]:
    """Register a function that returns an FFN and leaves its input alone.

    Args:
        refits: which matrices of the FFN it changes.
    """

    def register(function: Compensate[P]) -> Compensate[P]:
        run = cast(Run, function)
        method = Method(name, summary, paper, params, run, bool(refits), refits=refits)
        COMPENSATIONS.add(name, method)
        return function

    return register
