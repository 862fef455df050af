"""Loss: predict from what the router reads whose model has the lower loss on the next token.

An expert's share of a token is the softmax of minus the models' losses: the probability that the
next token came from its model, if all were equally likely before. The rows are fitted to the shares
as those of `text` are to memberships. It takes one pass of every model over all passages.
"""

import torch

from upcycle.router_init.gates.base import GateRows, LayerTexts, gate
from upcycle.router_init.gates.text import FitParams, fitted_rows


@gate(
    "loss",
    summary="ridge regression, on what the router reads, of whose model predicts the token best",
    paper="ours",
    params=FitParams,
    reads=("inputs", "losses"),
)
def by_loss(texts: LayerTexts, params: FitParams, rng: torch.Generator) -> GateRows:
    samples = []
    for passage, x_LD, loss_lE in zip(texts.passages, texts.inputs, texts.losses, strict=True):
        # After the last token there is none to predict.
        x_tD = x_LD[passage.front : -1].float()
        samples.append((x_tD, (-loss_lE[passage.front :].to(x_tD)).softmax(1)))
    return GateRows(fitted_rows(texts, samples, params.strength))
