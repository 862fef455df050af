"""A merge beside what it is made of: the perplexity of every model on every text.

The protocol is that of `run.py`; one model is in memory at a time. The mean of the sources, as a
dense model, is what a merge without experts would give: experts that do no better are not worth
their memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle.evaluation.run import compare, load_model
from upcycle.models.source import DenseSource

MEAN = "mean of the sources"


@dataclass(frozen=True)
class ModelPerplexity:
    """One model's perplexity on each text."""

    model: str
    texts: Mapping[str, float]


def perplexities(
    folders: Mapping[str, Path],
    averaged: Sequence[DenseSource],
    windows: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[str], None] = lambda model: None,
) -> Iterator[ModelPerplexity]:
    """The perplexity of each model on each text, then that of the mean of the sources.

    Args:
        folders: checkpoints by the names they go by: the merge, its base, its sources.
        averaged: the sources whose mean is measured; of none it is not.
        windows: tokens [W, L] of each text, which all models read alike.
        progress: told which model comes next.
    """
    for name, folder in folders.items():
        progress(name)
        yield _measured(name, load_model(folder, dtype, device), windows)
    if averaged:
        progress(MEAN)
        model = load_model(averaged[0].folder, dtype, device)
        become_mean(model, averaged)
        yield _measured(MEAN, model, windows)


def _measured(name: str, model: Any, windows: Mapping[str, Tensor]) -> ModelPerplexity:
    found = {
        text: compare(model, tokens_BL, None, lambda window: None).perplexity
        for text, tokens_BL in windows.items()
    }
    return ModelPerplexity(name, found)


@torch.no_grad()
def become_mean(model: Any, sources: Sequence[DenseSource]) -> None:
    """Give a loaded dense model the mean of the sources' weights, which have its shapes; one tensor
    of one source is read at a time."""
    weights = model.state_dict()
    for name in sources[0].tensors:
        mean = sources[0].read([name])[name].float()
        for number, source in enumerate(sources[1:], 2):
            mean += (source.read([name])[name].float() - mean) / number
        weights[name].copy_(mean)
