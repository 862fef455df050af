"""Mean: all tensors but the FFNs are averaged over the sources.

Branch-Train-MiX, arXiv:2403.07816, where the seed model is one of the sources.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from upcycle.conversion.rest.registry import rest
from upcycle.core.registry import Params


@rest("mean", summary="the mean of the sources' tensors", paper="arXiv:2403.07816")
def mean(base: Tensor, sources: Iterator[Tensor], params: Params, rng: torch.Generator) -> Tensor:
    # A running mean gives equal sources back bit for bit, which a sum over their number does not.
    merged = next(sources).float().clone()
    for number, tensor in enumerate(sources, 2):
        merged += (tensor.float() - merged) / number
    return merged
