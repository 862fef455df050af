"""Predictability: neurons whose output the hidden state foretells alike share an expert.

A router row is linear in x, so an expert is worth routing if one linear function tells when all of
its neurons matter. Per neuron, |h_i| |down[:, i]| is regressed on x; balanced k-means then groups
neurons by the distance between these predictions. What co-fires but can't be foretold does not
count.
"""

from collections.abc import Iterator

import torch
from pydantic import PositiveFloat
from torch import Tensor

from upcycle.core.clustering import balanced_kmeans
from upcycle.core.registry import Params
from upcycle.core.regression import predictable_profiles
from upcycle.core.types import LayerActivations
from upcycle.split.base import split_from_activations


class PredictabilityParams(Params):
    strength: PositiveFloat = 0.1
    """λ of the regressions, over the mean second moment of x."""


@split_from_activations(
    "predictability",
    summary="balanced k-means on what x foretells of each neuron's output",
    paper="ours",
    params=PredictabilityParams,
)
def split(
    activations: LayerActivations,
    num_experts: int,
    params: PredictabilityParams,
    rng: torch.Generator,
) -> Tensor:
    norm_F = activations.ffn.down_DF.norm(dim=0)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for x_tD, h_tF in activations.chunks():
            yield x_tD, h_tF.abs() * norm_F

    members_EM, _ = balanced_kmeans(
        predictable_profiles(pairs(), params.strength), num_experts, rng
    )
    return members_EM
