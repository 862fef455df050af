"""How far an encoder's hidden states are from those of the model that it was made from.

An encoder predicts no next token, so it has no perplexity. What is built on it sees its last hidden
states: those of single tokens, or their mean over a text, by which texts are compared.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from upcycle.evaluation.comparing import Step
from upcycle.evaluation.result import relative_error
from upcycle.evaluation.routing import counting_pairs
from upcycle.models.head import Decoded, decode, given
from upcycle.models.record.check import HiddenResult


@dataclass(frozen=True)
class HiddenComparison:
    """An encoder's last hidden states on a text, beside a reference's."""

    error: float
    """Root mean square difference over the reference's standard deviation."""
    worst_window: float
    """The largest such error of any window."""
    cosine: float
    """Of a token's hidden state and the reference's, the mean over tokens."""
    pooled_cosine: float
    """The same of windows' means, the mean over windows."""
    pairs: list[Tensor]
    """Per MoE layer, how many tokens selected both of two experts [E, E]."""


def compare_hidden(
    model: Any, tokens_BL: Tensor, reference: list[Decoded], step: Step
) -> HiddenComparison:
    """Compare an encoder with what another decoded of the same windows [B, L]."""
    mine, theirs = [], [_last(dense) for dense in reference]
    with counting_pairs(model) as pairs:
        for i, window_L in enumerate(tokens_BL):
            step(i)
            mine.append(_last(decode(model, window_L)))
    own_BLD, dense_BLD = torch.stack(mine), torch.stack(theirs)
    errors = [relative_error(own, dense) for own, dense in zip(own_BLD, dense_BLD, strict=True)]
    return HiddenComparison(
        error=relative_error(own_BLD, dense_BLD),
        worst_window=max(errors),
        cosine=float(cosine_similarity(own_BLD, dense_BLD, dim=-1).mean()),
        pooled_cosine=float(cosine_similarity(own_BLD.mean(1), dense_BLD.mean(1), dim=-1).mean()),
        pairs=pairs,
    )


def hidden_result(text: str, tokens: int, compared: HiddenComparison) -> HiddenResult:
    """The numbers of a text of so many tokens, as they are written."""
    return HiddenResult(
        kind=text,
        tokens=tokens,
        error=compared.error,
        worst_window=compared.worst_window,
        cosine=compared.cosine,
        pooled_cosine=compared.pooled_cosine,
    )


def _last(decoded: Decoded) -> Tensor:
    hidden_LD: Tensor = decoded.output.last_hidden_state[0].float()
    return hidden_LD


@torch.no_grad()
def put_out(model: Any, window_L: Tensor) -> Tensor:
    """What a model makes of one window of tokens [L] at last, in float32: logits [T, V] of those
    that tell the next, or where it has no head, hidden states [L, D]."""
    out = model(**given(model, window_L), use_cache=False)
    found: Tensor = out.last_hidden_state if getattr(out, "logits", None) is None else out.logits
    return found[0].float()
