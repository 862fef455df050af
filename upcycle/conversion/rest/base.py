"""Base: all tensors but the FFNs are the base's, bit for bit, as in mergekit's MoEs."""

from collections.abc import Iterator

import torch
from torch import Tensor

from upcycle.conversion.rest.registry import rest
from upcycle.core.registry import Params


@rest("base", summary="the base's tensors, unchanged", paper="baseline")
def keep(base: Tensor, sources: Iterator[Tensor], params: Params, rng: torch.Generator) -> Tensor:
    return base
