"""σ-MoE's balance: experts' mean share over the step's tokens is to have the largest entropy.

Csordás et al., EMNLP Findings 2023, arXiv:2310.10837. Shares are a softmax of the logits, whatever
the architecture makes scores by. Departure: log E is added, so that an even use costs nothing.
"""

import math

import torch
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.finetune.router_losses.base import Seen, router_loss


def mean_share(seen: Seen, params: Params) -> Tensor:
    """Each expert's mean share [E]."""
    return seen.mean(seen.logits_TE.softmax(-1))


@router_loss(
    "entropy",
    summary="the largest entropy of experts' mean share",
    paper="arXiv:2310.10837",
    statistic=mean_share,
)
def unevenness(share_E: Tensor, params: Params) -> Tensor:
    entropy: Tensor = torch.special.entr(share_E).sum()
    return math.log(len(share_E)) - entropy
