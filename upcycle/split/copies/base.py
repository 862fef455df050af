"""Perturbations: what makes copies of an FFN differ."""

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import torch

from upcycle.core.registry import Method, Params, Registry
from upcycle.core.types import DenseFFN

P = TypeVar("P", bound=Params, contravariant=True)


class Perturb(Protocol[P]):
    def __call__(self, ffn: DenseFFN, params: P, rng: torch.Generator) -> DenseFFN: ...


Run = Callable[[DenseFFN, Params, torch.Generator], DenseFFN]
PERTURBS: Registry[Method[Run]] = Registry("method")


def perturb(
    name: str, *, summary: str, paper: str, params: type[Params] = Params
) -> Callable[[Perturb[P]], Perturb[P]]:
    """Register a function that returns a changed expert and leaves its input alone."""

    def register(function: Perturb[P]) -> Perturb[P]:
        PERTURBS.add(
            name, Method(name, summary, paper, params, cast(Run, function), needs_activations=False)
        )
        return function

    return register
