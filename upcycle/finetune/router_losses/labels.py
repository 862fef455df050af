"""Routing by label: the tokens of each text of `data` belong to experts of its own.

−log of the share of a token's scores that falls on its text's experts. In a merge of a code and a
law model, trained on `code.txt+law.txt`, the first text's expert is the first.
"""

import torch
from torch import Tensor

from upcycle.core.flags import setting
from upcycle.core.registry import Params
from upcycle.finetune.router_losses.base import Facts, Seen, router_loss


class Labels(Params):
    experts: tuple[tuple[int, ...], ...] | None = None
    """Of each text in its order, which experts are its own; none of them for a text that may go
    anywhere. By default equal parts of all experts, in order."""

    def of(self, texts: int, experts: int) -> tuple[tuple[int, ...], ...]:
        """Each text's experts."""
        if self.experts is not None:
            return self.experts
        part = experts // texts
        return tuple(tuple(range(t * part, (t + 1) * part)) for t in range(texts))


def of_other_texts(facts: Facts, params: Labels) -> str:
    if facts.texts < 2:
        return "there is one text alone: name several by `data`, joined by +"
    if params.experts is None:
        if facts.experts % facts.texts == 0:
            return ""
        return (
            f"{facts.texts} texts get no equal parts of {facts.experts} experts: say which each "
            f"has by {setting('router_losses.labels.experts')}"
        )
    if len(params.experts) != facts.texts:
        given = setting("router_losses.labels.experts")
        return f"{given} is of {len(params.experts)} texts, but `data` of {facts.texts}"
    wrong = [e for group in params.experts for e in group if not 0 <= e < facts.experts]
    return f"there is no expert {wrong[0]} among {facts.experts}" if wrong else ""


@router_loss(
    "labels",
    summary="each text of `data` belongs to experts of its own",
    paper="ours",
    params=Labels,
    refusal=of_other_texts,
)
def unlikelihood(seen: Seen, params: Labels) -> Tensor:
    experts = seen.scores_TE.shape[1]
    groups = params.of(seen.texts, experts)
    own_NE = torch.zeros(len(groups), experts)
    for text, group in enumerate(groups):
        own_NE[text, list(group)] = 1
    own_TE = own_NE.to(seen.scores_TE)[seen.text_T]
    share_T = (seen.shares_TE * own_TE).sum(-1)
    return -seen.mean(torch.where(own_TE.any(-1), share_T, 1).log())
