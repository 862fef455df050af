"""Router initialisation: one row [D] per routed expert.

A router must be linear in x without a bias, because that is what every native target holds. Its
scale is free: for a split, only the order of the logits counts, and the conversion rescales them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, Unpack

import torch
from torch import Tensor

from upcycle.core.registry import About, Method, Params, Registry, registering
from upcycle.core.types import DenseFFN, LayerActivations

P = TypeVar("P", bound=Params, contravariant=True)


class WeightRouter(Protocol[P]):
    def __call__(
        self, ffn: DenseFFN, experts_EM: Tensor, params: P, rng: torch.Generator
    ) -> Tensor: ...


class ActivationRouter(Protocol[P]):
    def __call__(
        self, activations: LayerActivations, experts_EM: Tensor, params: P, rng: torch.Generator
    ) -> Tensor: ...


Run = Callable[[LayerActivations, Tensor, Params, torch.Generator], Tensor]


@dataclass(frozen=True)
class Router(Method[Run]):
    tells_copies_apart: bool = False
    """Whether its rows differ when all experts are equal."""


ROUTERS: Registry[Router] = Registry("router")


def router_from_weights(
    name: str, *, tells_copies_apart: bool = False, **about: Unpack[About]
) -> Callable[[WeightRouter[P]], WeightRouter[P]]:
    """Register a router that reads the FFN's weights alone."""

    def adapt(function: WeightRouter[Any]) -> Run:
        return lambda activations, *others: function(activations.ffn, *others)

    fields = {"needs_activations": False, "tells_copies_apart": tells_copies_apart}
    return registering(ROUTERS, Router, name=name, adapt=adapt, **fields, **about)


def router_from_activations(
    name: str, *, tells_copies_apart: bool = False, **about: Unpack[About]
) -> Callable[[ActivationRouter[P]], ActivationRouter[P]]:
    """Register a router that is fitted on the calibration tokens."""
    fields = {"needs_activations": True, "tells_copies_apart": tells_copies_apart}
    return registering(ROUTERS, Router, name=name, **fields, **about)
