"""Distance: how far the models of a merge are from the base, and from each other.

A fine-tune lies within a few hundredths of its base's length, copies of one file at 0, and a model
of another origin at 1 or beyond, where its FFNs mean nothing to the base's attention.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from upcycle.core.types import evenly

Part = Literal["ffn", "rest"]
SAMPLED = 2**16
"""Values of each tensor by which the models are compared with each other, at most."""
UNRELATED = 0.9
"""Of the base's length. Between two models that have only their size in common it is 1 or more."""


@dataclass(frozen=True)
class Distances:
    """Lengths of differences of weights, over the length of the base's weights."""

    to_base: list[float]
    """Of each model."""
    between: list[list[float]]
    """Of each two models, from a sample of large tensors."""


class Meter:
    """Adds up distances tensor by tensor, so that one tensor of one model is in memory at a time;
    of each model a sample of the tensor is kept until all have been seen."""

    def __init__(self, models: int) -> None:
        self._base: dict[Part, float] = dict.fromkeys(("ffn", "rest"), 0.0)
        self._squares = {part: torch.zeros(models, dtype=torch.float64) for part in self._base}
        self._gram = {part: torch.zeros(models, models, dtype=torch.float64) for part in self._base}

    def add(self, part: Part, base: Tensor, models: Iterator[Tensor]) -> None:
        """Take one tensor of the base, and the same of each model, into account."""
        self._base[part] += _square(base.float())
        samples = []
        for place, tensor in enumerate(models):
            change = tensor.float() - base
            self._squares[part][place] += _square(change)
            samples.append(evenly(change.flatten(), SAMPLED).clone())
            del change
        sample_NS = torch.stack(samples).double()
        seen = base.numel() / sample_NS.shape[1]
        self._gram[part] += seen * (sample_NS @ sample_NS.T)

    def distances(self, part: Part) -> Distances:
        """Of what has been seen of a part; 0 where that is nothing."""
        length = max(self._base[part], torch.finfo(torch.float64).tiny) ** 0.5
        gram_NN = self._gram[part]
        square_N = gram_NN.diagonal()
        between_NN = (square_N[:, None] + square_N - 2 * gram_NN).clamp(min=0).sqrt() / length
        # What is left of equal models is rounding.
        between_NN[between_NN < 1e-7 * (square_N.sqrt() / length).max()] = 0
        return Distances((self._squares[part].sqrt() / length).tolist(), between_NN.tolist())


def remarks(base: str, names: Sequence[str], ffn: Distances) -> list[str]:
    """What is remarkable of the models' FFNs, in sentences: some are equal, or of other origin."""
    found = []
    for place, name in enumerate(names):
        if ffn.to_base[place] > UNRELATED:
            found.append(
                f"{name} is {ffn.to_base[place]:.2f} of {base}'s length away from it, as models of "
                "another origin are: its FFNs mean nothing to the attention of this merge"
            )
        alike = [other for j, other in enumerate(names[:place]) if not ffn.between[place][j]]
        if alike:
            found.append(f"{name} has the same FFNs as {alike[0]}")
        elif not ffn.to_base[place]:
            found.append(f"{name} has the same FFNs as {base}")
    return found


def _square(values: Tensor) -> float:
    return float(values.flatten().double().square().sum())
