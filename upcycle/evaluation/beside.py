"""What a merge is made of: the perplexity of each source, and of their mean, on every text.

The protocol is that of `run.py`; one model is in memory at a time. The mean of the sources, as a
dense model, is what a merge without experts would give: experts that do no better are not worth
their memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upcycle.evaluation.comparing import compare
from upcycle.evaluation.distance import with_rows_of
from upcycle.models.loading import load_model
from upcycle.models.source import DenseSource

MEAN = "mean of the sources"


@dataclass(frozen=True)
class ModelPerplexity:
    """One model's perplexity on each text."""

    model: str
    texts: Mapping[str, float]


def perplexities(
    base: DenseSource,
    sources: Mapping[str, DenseSource],
    averaged: Sequence[DenseSource],
    windows: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    step: Callable[[int], None] = lambda window: None,
) -> Iterator[ModelPerplexity]:
    """The perplexity of each source on each text, then that of the mean of those averaged.

    A source is measured with the base's config and vocabulary, with which its config was compared;
    so one with an adapter is a source like others.

    Args:
        sources: by the names they go by.
        averaged: of none there is no mean.
        windows: tokens [W, L] of each text, which all models read alike.
        step: told of every window that is read.
    """
    if not sources and not averaged:
        return
    model = load_model(base.folder, dtype, device)
    for name, source in sources.items():
        become_mean(model, base, [source])
        yield measured(name, model, windows, step)
    if averaged:
        become_mean(model, base, averaged)
        yield measured(MEAN, model, windows, step)


def measured(
    name: str, model: Any, windows: Mapping[str, Tensor], step: Callable[[int], None]
) -> ModelPerplexity:
    """The perplexity of a loaded model on each text; arguments as of `perplexities`."""
    found = {
        text: compare(model, tokens_BL, None, step).perplexity
        for text, tokens_BL in windows.items()
    }
    return ModelPerplexity(name, found)


@torch.no_grad()
def become_mean(model: Any, base: DenseSource, sources: Sequence[DenseSource]) -> None:
    """Give a loaded dense model the mean of the sources' weights, where one has fewer rows of
    embeddings or lacks a tensor, with the base's; one tensor of one source is read at a time."""
    weights = model.state_dict()
    for name in base.text_names:
        ours = base.read([name])[name]
        mean = _float(ours, sources[0], name)
        for number, source in enumerate(sources[1:], 2):
            mean += (_float(ours, source, name) - mean) / number
        full = base.layout.full(name)
        weights[full if full in weights else name].copy_(mean)


def _float(ours: Tensor, source: DenseSource, name: str) -> Tensor:
    if name not in source.tensors:
        return ours.float().clone()
    return with_rows_of(ours, source.read([name])[name]).float().clone()
