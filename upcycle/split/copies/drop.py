"""Drop-upcycling: re-draw a share of each copy's neurons.

Nakamura et al., ICLR 2025, arXiv:2502.19261. Per expert one set of neurons, |set| = ratio * F,
is drawn and used for gate, up and down alike; the replaced entries of each matrix are drawn anew
from a normal distribution with their own mean and standard deviation. (The released code draws
the set anew per matrix, which leaves most neurons inconsistent; this follows the paper.)
"""

import torch
from pydantic import Field
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.core.types import DenseFFN
from upcycle.split.copies.base import perturb


class DropParams(Params):
    ratio: float = Field(default=0.5, ge=0, le=1)
    """Share of the neurons that are drawn anew."""


@perturb(
    "drop",
    summary="copies with a share of the neurons drawn anew (drop-upcycling)",
    paper="arXiv:2502.19261",
    params=DropParams,
)
def drop(ffn: DenseFFN, params: DropParams, rng: torch.Generator) -> DenseFFN:
    count = round(params.ratio * ffn.num_neurons)
    neurons = torch.randperm(ffn.num_neurons, generator=rng)[:count]

    def redraw(rows_FD: Tensor) -> Tensor:
        old = rows_FD[neurons].float()
        if old.numel() < 2:
            return rows_FD
        fresh = torch.randn(old.shape, generator=rng) * old.std() + old.mean()
        return rows_FD.index_copy(0, neurons, fresh.to(rows_FD.dtype))

    gate_FD = None if ffn.gate_FD is None else redraw(ffn.gate_FD)
    return DenseFFN(gate_FD, redraw(ffn.up_FD), redraw(ffn.down_DF.T).T, ffn.act)
