"""TIES: what the sources add to the base is merged where they agree on its sign.

TIES-merging, arXiv:2306.01708, for all tensors but the FFNs as in MergeME, arXiv:2502.00997: of
each source's change τ of a tensor only the largest entries stay, each entry takes the sign that
has the larger total, and what has that sign is summed (MergeME) or averaged (TIES-merging).

Departures: the largest entries are taken per tensor, as mergekit does, not over the whole model,
and all that are as large as the smallest of them stay, too. λ is 1 / N for a sum of N sources,
where MergeME's is 1/3 for its three; MergeME prints τ with its sign reversed, which would lead away
from the sources.
"""

from collections.abc import Iterator

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from upcycle.conversion.rest.registry import Rule, rest, scale_of
from upcycle.core.registry import Params


class TiesParams(Params):
    density: float = Field(default=0.8, gt=0, le=1)
    """The share of a source's changes of a tensor that stays."""
    rule: Rule = "sum"
    """Whether changes of the elected sign are summed, or averaged over the sources that have it."""
    scale: FiniteFloat | None = None
    """λ, what the merged change counts; by default 1 / N of a sum of N sources, 1 of a mean."""


@rest(
    "ties",
    summary="the base plus the sources' largest changes, where they agree on the sign",
    paper="arXiv:2502.00997",
    params=TiesParams,
)
def ties(
    base: Tensor, sources: Iterator[Tensor], params: TiesParams, rng: torch.Generator
) -> Tensor:
    # A sum per sign makes one pass of it: the sign is elected when all sources have been seen.
    up, down = torch.zeros(base.shape), torch.zeros(base.shape)
    ups, downs = (torch.zeros(base.shape, dtype=torch.int16) for _ in range(2))
    number = 0
    for number, tensor in enumerate(sources, 1):  # noqa: B007 (λ is by their number)
        change = trim(tensor.float() - base, params.density)
        ups += change > 0
        downs += change < 0
        up += change.clamp(min=0)
        down += change.clamp_(max=0)
    elected = torch.where(up + down >= 0, up, down)
    if params.rule == "mean":
        elected /= torch.where(up + down >= 0, ups, downs).clamp_(min=1)
    return elected.mul_(scale_of(params.scale, params.rule, number)).add_(base)


def trim(change: Tensor, density: float) -> Tensor:
    """A change without its smallest entries, in place: this share of them stays, at least one."""
    kept = max(1, round(density * change.numel()))
    size = change.abs()
    threshold = size.flatten().kthvalue(change.numel() - kept + 1).values
    return change.mul_(size >= threshold)
