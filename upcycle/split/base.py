"""Splits: which routed expert each neuron goes to.

A split sees the FFN without its shared neurons and returns experts [E, M] of equal size M = F / E:
an equal partition of its neurons, or (`partitions=False`) experts that may share a neuron and leave
another out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, Unpack

import torch
from torch import Tensor

from upcycle.core.registry import About, Method, Params, Registry, registering
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


@dataclass(frozen=True)
class Split(Method[Run]):
    partitions: bool = True
    """Whether each neuron belongs to exactly one expert."""


SPLITS: Registry[Split] = Registry("split")


def split_from_weights(
    name: str, **about: Unpack[About]
) -> Callable[[WeightSplit[P]], WeightSplit[P]]:
    """Register a split that reads the FFN's weights alone."""

    def adapt(function: WeightSplit[Any]) -> Run:
        return lambda activations, *others: function(activations.ffn, *others)

    return registering(SPLITS, Split, name=name, adapt=adapt, needs_activations=False, **about)


def split_from_activations(
    name: str, *, partitions: bool = True, **about: Unpack[About]
) -> Callable[[ActivationSplit[P]], ActivationSplit[P]]:
    """Register a split that looks at what the neurons do on the calibration tokens."""
    return registering(
        SPLITS, Split, name=name, needs_activations=True, partitions=partitions, **about
    )
