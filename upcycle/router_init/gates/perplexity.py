"""Perplexity: predict from what the router reads what MergeME's rule gives each expert.

MergeME, arXiv:2502.00997: of a whole sequence, the K experts of least perplexity get the softmax
of 1 / perplexity as their weights.

Departure: there every expert's model is run on every prompt to find its perplexity. Here the
weights are found for the passages, and rows are fitted to them as those of `text` are to
memberships, so that a linear router gives something like them token by token. What decides them is
how the models do on each other's text, and where all do well they are nearly even.
"""

from collections.abc import Iterator

import torch
from pydantic import PositiveInt
from torch import Tensor

from upcycle.router_init.gates.base import GateRows, LayerTexts, gate
from upcycle.router_init.gates.text import FitParams, Sample, added_row, fitted_rows


class PerplexityParams(FitParams):
    experts: PositiveInt = 2
    """K, how many experts get any weight of a passage."""


def samples(texts: LayerTexts, experts: int) -> Iterator[Sample]:
    """The tokens of each passage that another follows, and what the rule gives each expert."""
    for passage, x_LD, loss_lE in zip(texts.passages, texts.inputs, texts.losses, strict=True):
        x_tD = x_LD[passage.front : -1].float()
        # Of a passage without text the mean is no number, and counts for no token.
        weight_E = sequence_weights(loss_lE[passage.front :].mean(0), experts).to(x_tD)
        yield x_tD, weight_E.expand(len(x_tD), -1)


def one_more(texts: LayerTexts, before: GateRows, params: PerplexityParams) -> GateRows:
    found = list(samples(texts, params.experts))
    return GateRows(added_row(texts, before.rows_ED, found, params.strength))


@gate(
    "perplexity",
    summary="linear fit of the softmax of 1 / perplexity, over the best models on a passage",
    paper="arXiv:2502.00997",
    params=PerplexityParams,
    reads=("inputs", "losses"),
    add=one_more,
)
def by_perplexity(texts: LayerTexts, params: PerplexityParams, rng: torch.Generator) -> GateRows:
    found = list(samples(texts, params.experts))
    return GateRows(fitted_rows(texts, found, params.strength))


def sequence_weights(loss_E: Tensor, experts: int) -> Tensor:
    """MergeME's weights [E] of a sequence with these mean losses."""
    inverse_E = (-loss_E).exp()
    kept = inverse_E.topk(min(experts, len(inverse_E))).indices
    weight_E = torch.full_like(inverse_E, -torch.inf)
    weight_E[kept] = inverse_E[kept]
    return weight_E.softmax(0)
