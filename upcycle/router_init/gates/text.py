"""Text: predict from what the router reads to which expert's text a token belongs.

The rows are the ridge regression of membership on the FFN's input, over the tokens of all passages
but what stands before a text. Each expert's text counts the same, however long it is; a token of a
negative passage belongs to the other experts in equal parts. The rows are then made longer until
the softmax of their logits fits best, which is tried on every second passage for rows fitted on the
others (of an only one, on its second half): a regression's own predictions lie between 0 and 1, and
would mix the experts nearly evenly.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from pydantic import PositiveFloat
from torch import Tensor

from upcycle.core.errors import UpcycleError
from upcycle.core.registry import Params
from upcycle.core.regression import ridge, sharpness
from upcycle.router_init.gates.base import GateRows, LayerTexts, gate

LONGEST = 30.0
"""What rows are multiplied by at most: an expert that is ahead then has all the weight."""
Sample = tuple[Tensor, Tensor]
"""Inputs x [t, D], and each expert's share of their tokens [t, E]; a row of shares adds up to what
its token counts."""


class FitParams(Params):
    strength: PositiveFloat = 0.1
    """λ over the mean second moment of x."""


def one_more(texts: LayerTexts, before: GateRows, params: FitParams) -> GateRows:
    samples = list(memberships(texts, of=[texts.num_experts - 1]))
    return GateRows(added_row(texts, before.rows_ED, samples, params.strength))


@gate(
    "text",
    summary="ridge regression, on what the router reads, of whose text a token belongs to",
    paper="ours",
    params=FitParams,
    reads=("inputs",),
    add=one_more,
)
def by_text(texts: LayerTexts, params: FitParams, rng: torch.Generator) -> GateRows:
    return GateRows(fitted_rows(texts, list(memberships(texts)), params.strength))


def memberships(texts: LayerTexts, of: Iterable[int] | None = None) -> Iterator[Sample]:
    """The tokens of each passage, and whose they are.

    Args:
        of: the experts that must have some; by default all.

    Raises:
        UpcycleError: one of them has none.
    """
    experts = texts.num_experts
    needed = list(range(experts) if of is None else of)
    for expert in needed:
        texts.of(expert, negative=False)
    tokens: Counter[tuple[int, bool]] = Counter()
    for passage in texts.passages:
        tokens[passage.expert, passage.negative] += len(passage.ids_L) - passage.front
    if bare := [expert for expert in needed if not tokens[expert, False]]:
        raise UpcycleError(
            f"expert {bare[0]}'s prompts hold no text, on which its row of the router could be "
            "fitted: give it some, or a random router"
        )
    mean = sum(tokens.values()) / len(tokens)
    for passage, x_LD in zip(texts.passages, texts.inputs, strict=True):
        x_tD = x_LD[passage.front :].float()
        share_E = x_tD.new_zeros(experts)
        share_E[passage.expert] = 1
        if passage.negative:
            share_E = (1 - share_E) / max(1, experts - 1)
        counts = mean / tokens[passage.expert, passage.negative] if len(x_tD) else 0.0
        yield x_tD, (counts * share_E).expand(len(x_tD), -1)


def fitted_rows(texts: LayerTexts, samples: Sequence[Sample], strength: float) -> Tensor:
    """Rows [E, D] whose logits' softmax is near the shares, by ridge regression.

    Args:
        samples: of each passage.
    """
    rows_ED = ridge(_pairs(samples), strength)
    fitted, tried = _parts(texts, samples)
    if not any(len(x_tD) for x_tD, _ in tried):
        return rows_ED
    tried_ED = ridge(_pairs(fitted), strength)
    logits_TE = torch.cat([x_tD @ tried_ED.T for x_tD, _ in tried])
    share_TE = torch.cat([share_tE for _, share_tE in tried])
    return rows_ED * sharpness(logits_TE, share_TE, most=LONGEST)


def added_row(
    texts: LayerTexts, rows_ED: Tensor, samples: Sequence[Sample], strength: float
) -> Tensor:
    """The row [1, D] of one expert more, the last of the shares: fitted to them like all others,
    and then made longer until it takes as much from the rows that there are, which stay, as the
    shares give it.

    Args:
        rows_ED: of the other experts.
        samples: of each passage.
    """
    row_1D = ridge(_pairs(samples), strength)[-1:]
    fitted, tried = _parts(texts, samples)
    if not any(len(x_tD) for x_tD, _ in tried):
        return row_1D
    tried_1D = ridge(_pairs(fitted), strength)[-1:]
    x_TD = torch.cat([x_tD for x_tD, _ in tried])
    share_TE = torch.cat([share_tE for _, share_tE in tried])
    own_T, counts_T = share_TE[:, -1], share_TE.sum(1)
    logit_T = (x_TD @ tried_1D.T)[:, 0]
    others_T = (x_TD @ rows_ED.to(x_TD).T).logsumexp(1)
    zero_T = torch.zeros_like(logit_T)
    return row_1D * sharpness(
        torch.stack([zero_T, logit_T], 1),
        torch.stack([counts_T - own_T, own_T], 1),
        most=LONGEST,
        beside_TE=torch.stack([others_T, zero_T], 1),
    )


def _parts(texts: LayerTexts, samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """What is fitted on, and what that is tried on: every second passage of an expert's, and of one
    that has no other, the second half."""
    fitted, tried = [], []
    places: Counter[tuple[int, bool]] = Counter()
    for passage, (x_tD, share_tE) in zip(texts.passages, samples, strict=True):
        owner = (passage.expert, passage.negative)
        if len(texts.of(passage.expert, negative=passage.negative)) == 1:
            half = (len(x_tD) + 1) // 2
            fitted.append((x_tD[:half], share_tE[:half]))
            tried.append((x_tD[half:], share_tE[half:]))
        else:
            (tried if places[owner] % 2 else fitted).append((x_tD, share_tE))
        places[owner] += 1
    return fitted, tried


def _pairs(samples: Sequence[Sample]) -> Iterator[Sample]:
    """What to regress on what: shares less their mean over experts, which no choice among experts
    depends on, every token counting as its shares say."""
    for x_tD, share_tE in samples:
        counts_t1 = share_tE.sum(1, keepdim=True)
        root_t1 = counts_t1.sqrt().clamp_min(torch.finfo(x_tD.dtype).tiny)
        yield x_tD * root_t1, (share_tE - counts_t1 / share_tE.shape[1]) / root_t1
