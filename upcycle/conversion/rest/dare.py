"""DARE: a random part of what each source adds to the base, made larger to stand for all of it.

DARE, arXiv:2311.03099, for all tensors but the FFNs as in MergeME, arXiv:2502.00997: each entry of
a source's change τ of a tensor stays with probability p and is divided by p, then the sources'
changes are summed (MergeME) or averaged.

Departures: λ is 1 / N for a sum of N sources, where MergeME's is 1/3 for its three; MergeME prints
τ with its sign reversed, which would lead away from the sources.
"""

from collections.abc import Iterator

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from upcycle.conversion.rest.registry import Rule, rest, scale_of
from upcycle.core.registry import Params


class DareParams(Params):
    density: float = Field(default=0.8, gt=0, le=1)
    """p, the probability by which an entry of a source's change stays."""
    rule: Rule = "sum"
    """Whether the sources' changes are summed, or averaged."""
    scale: FiniteFloat | None = None
    """λ, what the merged change counts; by default 1 / N of a sum of N sources, 1 of a mean."""


@rest(
    "dare",
    summary="the base plus a random part of each source's changes, rescaled",
    paper="arXiv:2502.00997",
    params=DareParams,
)
def dare(
    base: Tensor, sources: Iterator[Tensor], params: DareParams, rng: torch.Generator
) -> Tensor:
    merged, number = torch.zeros(base.shape), 0
    for number, tensor in enumerate(sources, 1):  # noqa: B007 (λ is by their number)
        stays = torch.empty(base.shape, dtype=torch.bool).bernoulli_(params.density, generator=rng)
        merged += (tensor.float() - base).mul_(stays)
    if params.rule == "mean":
        merged /= number
    scale = scale_of(params.scale, params.rule, number)
    return merged.mul_(scale / params.density).add_(base)
