"""Shared experts: which neurons are on for every token."""

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from upcycle.core.registry import Method, Params, Registry
from upcycle.core.types import Geometry, LayerActivations

P = TypeVar("P", bound=Params, contravariant=True)


class Score(Protocol[P]):
    """How much each neuron deserves to be shared, [F]; the largest are taken, of equals the
    first."""

    def __call__(self, activations: LayerActivations, params: P) -> Tensor: ...


class ExpertScore(Protocol[P]):
    """The same, of a rule that depends on what the experts will be."""

    def __call__(
        self, activations: LayerActivations, geometry: Geometry, params: P, rng: torch.Generator
    ) -> Tensor: ...


Run = Callable[[LayerActivations, Geometry, Params, torch.Generator], Tensor]
SHARED: Registry[Method[Run]] = Registry("shared-expert rule")


def shared_by(
    name: str, *, summary: str, paper: str, params: type[Params] = Params
) -> Callable[[Score[P]], Score[P]]:
    """Register a rule that scores neurons by what they do on the calibration tokens."""

    def register(function: Score[P]) -> Score[P]:
        def run(acts: LayerActivations, geometry: Geometry, p: P, rng: torch.Generator) -> Tensor:
            return function(acts, p)

        SHARED.add(
            name, Method(name, summary, paper, params, cast(Run, run), needs_activations=True)
        )
        return function

    return register


def shared_by_experts(
    name: str, *, summary: str, paper: str, params: type[Params] = Params
) -> Callable[[ExpertScore[P]], ExpertScore[P]]:
    """Register a rule that scores neurons by what experts of this number and size want."""

    def register(function: ExpertScore[P]) -> ExpertScore[P]:
        SHARED.add(
            name, Method(name, summary, paper, params, cast(Run, function), needs_activations=True)
        )
        return function

    return register
