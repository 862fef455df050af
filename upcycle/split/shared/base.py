"""Shared experts: which neurons are on for every token."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, Unpack

import torch
from torch import Tensor

from upcycle.core.registry import About, Method, Params, Registry, registering
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


def shared_by(name: str, **about: Unpack[About]) -> Callable[[Score[P]], Score[P]]:
    """Register a rule that scores neurons by what they do on the calibration tokens."""

    def adapt(function: Score[Any]) -> Run:
        return lambda activations, geometry, params, rng: function(activations, params)

    return registering(SHARED, Method, name=name, adapt=adapt, needs_activations=True, **about)


def shared_by_experts(
    name: str, **about: Unpack[About]
) -> Callable[[ExpertScore[P]], ExpertScore[P]]:
    """Register a rule that scores neurons by what experts of this number and size want."""
    return registering(SHARED, Method, name=name, needs_activations=True, **about)
