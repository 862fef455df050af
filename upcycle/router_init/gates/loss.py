"""Loss: predict from what the router reads whose model has the lower loss on the next token.

An expert's share of a token is the softmax of minus the models' losses: the probability that the
next token came from its model, if all were equally likely before. The rows are fitted to the shares
as those of `text` are to memberships. It takes one pass of every model over all passages.
"""

from collections.abc import Iterator

import torch

from upcycle.router_init.gates.base import GateRows, LayerTexts, gate
from upcycle.router_init.gates.text import FitParams, Sample, added_row, fitted_rows


def samples(texts: LayerTexts) -> Iterator[Sample]:
    """The tokens of each passage that another follows, and the models' shares of them."""
    for passage, x_LD, loss_lE in zip(texts.passages, texts.inputs, texts.losses, strict=True):
        # After the last token there is none to predict.
        x_tD = x_LD[passage.front : -1].float()
        yield x_tD, (-loss_lE[passage.front :].to(x_tD)).softmax(1)


def one_more(texts: LayerTexts, before: GateRows, params: FitParams) -> GateRows:
    return GateRows(added_row(texts, before.rows_ED, list(samples(texts)), params.strength))


@gate(
    "loss",
    summary="ridge regression, on what the router reads, of whose model predicts the token best",
    paper="ours",
    params=FitParams,
    reads=("inputs", "losses"),
    add=one_more,
)
def by_loss(texts: LayerTexts, params: FitParams, rng: torch.Generator) -> GateRows:
    return GateRows(fitted_rows(texts, list(samples(texts)), params.strength))
