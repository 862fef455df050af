"""Balanced transport: a plan that deals F items out to E bins of F / E, soft or rounded."""

from math import log

import torch
from torch import Tensor

from upcycle.core.clustering import greedy_assignment


def transport(affinity_FE: Tensor, temperature: float, iterations: int) -> Tensor:
    """Logarithms of the plan [F, E] nearest to exp(affinity / temperature) in relative entropy
    whose rows add up to 1 and whose columns to F / E: Sinkhorn's algorithm in the log domain."""
    plan_FE = affinity_FE / temperature
    log_size = log(plan_FE.shape[0] / plan_FE.shape[1])
    for _ in range(iterations):
        plan_FE = plan_FE - plan_FE.logsumexp(1, keepdim=True)
        plan_FE = plan_FE - plan_FE.logsumexp(0, keepdim=True) + log_size
    return plan_FE


def partition(plan_FE: Tensor) -> Tensor:
    """The plan rounded, [F, E]: 1 for an item's only bin, the largest shares first."""
    owner_F = greedy_assignment(plan_FE.detach().T.cpu())
    return torch.nn.functional.one_hot(owner_F, plan_FE.shape[1]).to(plan_FE)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The hard values, with the gradient of the soft ones (Bengio et al., arXiv:1308.3432)."""
    return hard + (soft - soft.detach())
