"""Linear: all tensors but the FFNs are a weighted mean of the sources'.

Model soups, arXiv:2203.05482, with weights that are given. A source that is to count more for
what all experts share gets more; the base counts if it is a source.
"""

from collections.abc import Iterator

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from upcycle.conversion.rest.registry import rest
from upcycle.core.errors import UpcycleError
from upcycle.core.registry import Params


class LinearParams(Params):
    weights: list[NonNegativeFloat] = Field(default_factory=list)
    """What each source counts, in the order of the experts; only their ratios matter. None: all
    count the same."""


@rest(
    "linear",
    summary="a mean of the sources' tensors, weighted per source",
    paper="arXiv:2203.05482",
    params=LinearParams,
)
def linear(
    base: Tensor, sources: Iterator[Tensor], params: LinearParams, rng: torch.Generator
) -> Tensor:
    total, merged, number = 0.0, torch.zeros(base.shape), 0
    weights = iter(params.weights)
    for number, tensor in enumerate(sources, 1):  # noqa: B007 (checked below)
        weight = next(weights, 0.0) if params.weights else 1.0
        total += weight
        if weight:
            merged += (tensor.float() - merged) * (weight / total)
    check_weights(params, number)
    return merged


def check_weights(params: LinearParams, sources: int) -> None:
    """Raise unless there is a weight for each source, and one of them counts.

    Raises:
        UpcycleError: the sentence names both numbers.
    """
    weights = params.weights
    if weights and len(weights) != sources:
        raise UpcycleError(
            f"rest rule 'linear' has {len(weights)} weights for {sources} sources: give one for "
            "each, in their order"
        )
    if weights and not any(weights):
        raise UpcycleError("rest rule 'linear' has only weights of 0: one source must count")
