"""Distance: how far the models of a merge are from the base, and from each other.

A fine-tune lies within a few hundredths of its base's length, copies of one file at 0, and a model
of another origin at 1 or beyond, where its FFNs mean nothing to the base's attention.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from upcycle.core.types import evenly

Part = Literal["ffn", "rest"]
PARTS: tuple[Part, ...] = ("ffn", "rest")
SAMPLED = 2**16
"""Values of each tensor by which the models are compared with each other, at most."""
CHUNK = 2**20
"""Values that are compared at once."""
UNRELATED = 0.9
"""Of the base's length. Between two models that have only their size in common it is 1 or more."""


@dataclass(frozen=True)
class Distances:
    """Lengths of differences of weights, over the length of the base's weights."""

    to_base: list[float]
    """Of each model."""
    between: Sequence[Sequence[float | None]]
    """Of each two models, from a sample of large tensors; None where that is not known."""


@dataclass
class _Sums:
    """Squares of lengths over all tensors of a part."""

    base: float
    changes_N: Tensor
    """Of what each model adds to the base."""
    gram_NN: Tensor
    """Products of what each two models add."""


@dataclass
class _Seen:
    """One tensor, of which some models have been seen."""

    numel: int
    samples: dict[str, Tensor] = field(default_factory=dict)
    """Of what each model adds to the base."""


class Meter:
    """Adds up distances tensor by tensor, so that one tensor of one model is in memory at a time;
    of each model a sample is kept until the tensor is closed. A model that was not seen by then has
    the base's."""

    def __init__(self, models: Sequence[str]) -> None:
        self.models = tuple(models)
        count = len(self.models)
        self._sums = {
            part: _Sums(
                0.0,
                torch.zeros(count, dtype=torch.float64),
                torch.zeros(count, count, dtype=torch.float64),
            )
            for part in PARTS
        }
        self._open: dict[tuple[Part, str], _Seen] = {}

    def awaits(self, part: Part, name: str, model: str) -> bool:
        """Whether a model is one of these, and its tensor of this name has not been seen."""
        seen = self._open.get((part, name))
        return model in self.models and (seen is None or model not in seen.samples)

    def see(self, part: Part, name: str, model: str, base: Tensor, tensor: Tensor) -> None:
        """Take one model's tensor into account, beside the base's."""
        if not self.awaits(part, name, model):
            return
        sums, key = self._sums[part], (part, name)
        mine, its = base.flatten(), with_rows_of(base, tensor).flatten()
        if key not in self._open:
            self._open[key] = _Seen(base.numel())
            sums.base += sum(_square(piece.float()) for piece in mine.split(CHUNK))
        sums.changes_N[self.models.index(model)] += sum(
            _square(one.float() - other.float())
            for one, other in zip(its.split(CHUNK), mine.split(CHUNK), strict=True)
        )
        sample = evenly(its, SAMPLED).float() - evenly(mine, SAMPLED).float()
        self._open[key].samples[model] = sample

    def close(self) -> None:
        """All models' tensors that were begun are seen."""
        for (part, _), seen in self._open.items():
            none = torch.zeros_like(next(iter(seen.samples.values())))
            sample_NS = torch.stack([seen.samples.get(model, none) for model in self.models])
            sample_NS = sample_NS.double()
            stands_for = seen.numel / sample_NS.shape[1]
            self._sums[part].gram_NN += stands_for * (sample_NS @ sample_NS.T)
        self._open.clear()

    def plain(self) -> dict[str, Any]:
        """What was seen, as plain values, all of it closed."""
        self.close()
        return {
            part: {
                "base": sums.base,
                "changes": sums.changes_N.tolist(),
                "gram": sums.gram_NN.tolist(),
            }
            for part, sums in self._sums.items()
        }

    def add(self, seen: Mapping[str, Any]) -> None:
        """Take into account what another meter of these models saw, as `plain` has it."""
        for part, sums in self._sums.items():
            sums.base += seen[part]["base"]
            sums.changes_N += torch.tensor(seen[part]["changes"], dtype=torch.float64)
            sums.gram_NN += torch.tensor(seen[part]["gram"], dtype=torch.float64)

    def distances(self, part: Part) -> Distances:
        """Of what has been seen of a part; 0 where that is nothing."""
        sums = self._sums[part]
        length = max(sums.base, torch.finfo(torch.float64).tiny) ** 0.5
        square_N = sums.gram_NN.diagonal()
        between_NN = (square_N[:, None] + square_N - 2 * sums.gram_NN).clamp(min=0).sqrt() / length
        # What is left of equal models is rounding.
        between_NN[between_NN < 1e-7 * (square_N.sqrt() / length).max()] = 0
        return Distances((sums.changes_N.sqrt() / length).tolist(), between_NN.tolist())


def with_rows_of(base: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with as many rows as the base's: of a vocabulary that grew, what both have, and
    the base's where a model has none."""
    if tensor.shape == base.shape:
        return tensor
    return torch.cat([tensor[: len(base)].to(base.dtype), base[len(tensor) :]])


def remarks(base: str, names: Sequence[str], ffn: Distances) -> list[str]:
    """What is remarkable of the models' FFNs, in sentences: some are equal, or of other origin."""
    found = []
    for place, name in enumerate(names):
        if ffn.to_base[place] > UNRELATED:
            found.append(
                f"{name} is {ffn.to_base[place]:.2f} of {base}'s length away from it, as models of "
                "another origin are: its FFNs mean nothing to the attention of this merge"
            )
        alike = [other for j, other in enumerate(names[:place]) if ffn.between[place][j] == 0]
        if alike:
            found.append(f"{name} has the same FFNs as {alike[0]}")
        elif not ffn.to_base[place]:
            found.append(f"{name} has the same FFNs as {base}")
    return found


def _square(values: Tensor) -> float:
    return float(values.double().square().sum())
