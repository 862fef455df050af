"""Load balancing of Switch Transformers: E Σₑ fₑ Pₑ, with f the share of the step's selections that
fall on an expert and P its mean score; 1 when both are uniform.

Fedus et al., JMLR 2022, arXiv:2101.03961. The losses of transformers and Megatron are K times this
one, of K experts per token. f is of all sequences of a step (arXiv:2501.11873).
"""

import torch
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.finetune.router_losses.base import Seen, router_loss


def load_and_scores(seen: Seen, params: Params) -> Tensor:
    """Each expert's share of the selections, and its mean score [2, E]."""
    return torch.stack([seen.load_E, seen.mean(seen.shares_TE)])


@router_loss(
    "balance",
    summary="experts that are selected more often get lower scores",
    paper="arXiv:2101.03961",
    statistic=load_and_scores,
)
def balance(load_and_score_2E: Tensor, params: Params) -> Tensor:
    return unevenness(load_and_score_2E)


def unevenness(load_and_score_2E: Tensor) -> Tensor:
    """E Σₑ fₑ Pₑ."""
    load_E, score_E = load_and_score_2E
    loss: Tensor = (load_E * score_E).sum() * len(load_E)
    return loss
