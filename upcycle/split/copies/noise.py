"""Noise: add a little Gaussian noise to every copy.

An ablation of sparse upcycling, arXiv:2212.05055, and of drop-upcycling, arXiv:2502.19261.

Departure: the latter's code adds N(0, 0.02) to a random half of the neurons. Here all weights get
noise, in proportion to their matrix's own standard deviation.
"""

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.core.types import DenseFFN
from upcycle.split.copies.base import perturb


class NoiseParams(Params):
    scale: NonNegativeFloat = 0.01
    """Standard deviation of the noise, as a share of each matrix's own."""


@perturb(
    "noise",
    summary="copies with Gaussian noise on every weight",
    paper="arXiv:2212.05055",
    params=NoiseParams,
)
def noise(ffn: DenseFFN, params: NoiseParams, rng: torch.Generator) -> DenseFFN:
    def shake(weight: Tensor) -> Tensor:
        old = weight.float()
        return (old + torch.randn(old.shape, generator=rng) * params.scale * old.std()).to(
            weight.dtype
        )

    return ffn.changed(shake)
