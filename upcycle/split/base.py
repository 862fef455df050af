"""Splits: which routed expert each neuron goes to.

A split sees the FFN without its shared neurons and returns experts [E, M] of equal size M = F / E:
an equal partition of its neurons, or (`partitions=False`) experts that may share a neuron and leave
another out.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from upcycle.core.registry import Method, Params, Registry
from upcycle.core.types import DenseFFN, LayerActivations

P = TypeVar("P", bound=Params, contravariant=True)


class WeightSplit(Protocol[P]):
    def __call__(
        self, ffn: DenseFFN, num_experts: int, params: P, rng: torch.Generator
    ) -> Tensor: ...


class ActivationSplit(Protocol[P]):
    def __call__(
        self, activations: LayerActivations, num_experts: int, params: P, rng: torch.Generator
    ) -> Tensor: ...


Run = Callable[[LayerActivations, int, Params, torch.Generator], Tensor]
SPLITS: Registry[Method[Run]] = Registry("split")


def split_from_weights(
    name: str, *, summary: str, paper: str, params: type[Params] = Params
) -> Callable[[WeightSplit[P]], WeightSplit[P]]:
    """Register a split that reads the FFN's weights alone."""

    def register(function: WeightSplit[P]) -> WeightSplit[P]:
        def run(acts: LayerActivations, num_experts: int, p: P, rng: torch.Generator) -> Tensor:
            return function(acts.ffn, num_experts, p, rng)

        SPLITS.add(
            name, Method(name, summary, paper, params, cast(Run, run), needs_activations=False)
        )
        return function

    return register


def split_from_activations(
    name: str,
    *,
    summary: str,
    paper: str,
    params: type[Params] = Params,
    partitions: bool = True,
) -> Callable[[ActivationSplit[P]], ActivationSplit[P]]:
    """Register a split that looks at what the neurons do on the calibration tokens."""

    def register(function: ActivationSplit[P]) -> ActivationSplit[P]:
        run = cast(Run, function)
        entry = Method(
            name, summary, paper, params, run, needs_activations=True, partitions=partitions
        )
        SPLITS.add(name, entry)
        return function

    return register
