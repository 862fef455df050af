"""The rest: what becomes of all tensors but the FFNs where several models are merged into one MoE.

A method sees one tensor at a time, of the base and of each source, and reads a source's when it
asks for the next: however many sources there are, one of their tensors is in memory.
"""

from collections.abc import Callable, Iterator
from typing import Literal, Protocol, TypeVar, Unpack

import torch
from torch import Tensor

from upcycle.core.registry import About, Method, Params, Registry, registering

P = TypeVar("P", bound=Params, contravariant=True)
Rule = Literal["sum", "mean"]
"""How what the sources add to the base is put together."""


class MergeRest(Protocol[P]):
    """One tensor of the base, and the same of each source, in the order of the experts, as one.

    The result is in float32, or is the base's tensor itself; no input is changed. `rng` is this
    tensor's own.
    """

    def __call__(
        self, base: Tensor, sources: Iterator[Tensor], params: P, rng: torch.Generator
    ) -> Tensor: ...


Run = Callable[[Tensor, Iterator[Tensor], Params, torch.Generator], Tensor]
RESTS: Registry[Method[Run]] = Registry("rest rule")


def rest(name: str, **about: Unpack[About]) -> Callable[[MergeRest[P]], MergeRest[P]]:
    """Register a way to merge all tensors but the FFNs."""
    return registering(RESTS, Method, name=name, needs_activations=False, **about)


def scale_of(given: float | None, rule: Rule, sources: int) -> float:
    """λ: what was given; else a sum of N sources counts 1 / N, so that equal ones don't overshoot,
    and a mean counts 1."""
    if given is not None:
        return given
    return 1 / max(1, sources) if rule == "sum" else 1.0
