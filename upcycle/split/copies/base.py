"""Perturbations: what makes copies of an FFN differ."""

from collections.abc import Callable
from typing import Protocol, TypeVar, Unpack

import torch

from upcycle.core.registry import About, Method, Params, Registry, registering
from upcycle.core.types import DenseFFN

P = TypeVar("P", bound=Params, contravariant=True)


class Perturb(Protocol[P]):
    def __call__(self, ffn: DenseFFN, params: P, rng: torch.Generator) -> DenseFFN: ...


Run = Callable[[DenseFFN, Params, torch.Generator], DenseFFN]
PERTURBS: Registry[Method[Run]] = Registry("method")


def perturb(name: str, **about: Unpack[About]) -> Callable[[Perturb[P]], Perturb[P]]:
    """Register a function that returns a changed expert and leaves its input alone."""
    return registering(PERTURBS, Method, name=name, needs_activations=False, **about)
