"""Common neurons: the most important ones in every expert, the others dealt out by rank.

MoEBERT's split, arXiv:2204.07675, as released: neurons are sorted by their Taylor importance. The
first are in all experts; of the others each expert takes every E-th, until it is full. The least
important are in none.

Departure: the paper's importance of a neuron adds up w ∂loss/∂w for its rows and columns, in
absolute value text by text. Of down's column, and of up's row where there is a gate, that is
Σ h ∂loss/∂h, the part that is taken here; of the row that the activation function is applied to it
is the same under a ReLU, and near it otherwise.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from upcycle.core.importance import GradientParams, taylor_by_text
from upcycle.core.types import LayerActivations
from upcycle.split.base import split_from_activations


class CommonNeuronsParams(GradientParams):
    common: Annotated[float, Field(ge=0, lt=1)] = 0.667
    """Share of each expert that all experts have in common."""


@split_from_activations(
    "common_neurons",
    summary="the neurons of largest Taylor importance in every expert, the rest dealt out by rank",
    paper="arXiv:2204.07675",
    params=CommonNeuronsParams,
    partitions=False,
)
def split(
    activations: LayerActivations,
    num_experts: int,
    params: CommonNeuronsParams,
    rng: torch.Generator,
) -> Tensor:
    order_F = taylor_by_text(activations).cpu().argsort(descending=True, stable=True)
    size = len(order_F) // num_experts
    count = round(params.common * size)
    common_C, others = order_F[:count], order_F[count:]
    dealt = [others[expert::num_experts][: size - count] for expert in range(num_experts)]
    return torch.stack([torch.cat([common_C, own]) for own in dealt]).sort(dim=1).values
