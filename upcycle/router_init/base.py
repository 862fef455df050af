"""Router initialisation: one row [D] per routed expert.

A router must be linear in x without a bias, because that is what every native target holds. Its
scale is free: for a split, only the order of the logits counts, and the conversion rescales them.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from upcycle.core.registry import Method, Params, Registry
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
ROUTERS: Registry[Method[Run]] = Registry("router")


def router_from_weights(
    name: str,
    *,
    summary: str,
    paper: str,
    params: type[Params] = Params,
    tells_copies_apart: bool = False,
) -> Callable[[WeightRouter[P]], WeightRouter[P]]:
    """Register a router that reads the FFN's weights alone."""

    def register(function: WeightRouter[P]) -> WeightRouter[P]:
        def run(acts: LayerActivations, experts_EM: Tensor, p: P, rng: torch.Generator) -> Tensor:
            return function(acts.ffn, experts_EM, p, rng)

        entry = Method(name, summary, paper, params, cast(Run, run), False, tells_copies_apart)
        ROUTERS.add(name, entry)
        return function

    return register


def router_from_activations(
    name: str,
    *,
    summary: str,
    paper: str,
    params: type[Params] = Params,
    tells_copies_apart: bool = False,
) -> Callable[[ActivationRouter[P]], ActivationRouter[P]]:
    """Register a router that is fitted on the calibration tokens."""

    def register(function: ActivationRouter[P]) -> ActivationRouter[P]:
        entry = Method(name, summary, paper, params, cast(Run, function), True, tells_copies_apart)
        ROUTERS.add(name, entry)
        return function

    return register
