"""Router z-loss: the mean squared log-partition of the router, which keeps logits small.

Zoph et al. 2022, ST-MoE, arXiv:2202.08906.
"""

from torch import Tensor

from upcycle.core.registry import Params
from upcycle.finetune.router_losses.base import Seen, router_loss


@router_loss("z_loss", summary="keeps a router's logits small", paper="arXiv:2202.08906")
def z_loss(seen: Seen, params: Params) -> Tensor:
    return seen.mean(seen.logits_TE.logsumexp(-1).square())
