"""How tokens spread over experts: statistics of which experts were selected together."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upcycle.models.blocks import moe_blocks, watch_selections

FIT_ROUNDS = 30
"""After which 64 experts, some nearly always on, have their shares within 0.1 %."""
PAIRS_AT_ONCE = 4096


@dataclass(frozen=True)
class LayerRouting:
    """One MoE layer's routing over all tokens seen."""

    layer: int
    load: list[float]
    """Per expert: its share of the selections over the fair share, 1 / E."""
    entropy: float
    """Of the loads, over that of equal loads: 1 is even, 0 is one expert for all tokens."""
    dead: int
    """Experts that no token selected."""
    co_selection: list[list[float]]
    """Per two experts: the share of tokens that select both, over the product of the shares that
    select either, which is what independent selections would give. A token selects K different
    experts, so experts chosen at random have E (K − 1) / ((E − 1) K), not 1. 1 on the diagonal;
    0 where an expert is dead."""


def layer_routing(layer: int, pairs_EE: Tensor, tokens: int) -> LayerRouting:
    """The statistics of the tokens that `count_pairs` counted."""
    count_E = pairs_EE.diagonal()
    return LayerRouting(
        layer=layer,
        load=utilisation(count_E),
        entropy=round(relative_entropy(count_E), 4),
        dead=int((count_E == 0).sum()),
        co_selection=[
            [round(r, 4) for r in row] for row in co_selection(pairs_EE, tokens).tolist()
        ],
    )


@contextmanager
def counting_pairs(model: Any) -> Iterator[list[Tensor]]:
    """Per MoE layer, how many of the tokens that go through the model within the context selected
    both of two experts [E, E]."""
    blocks = moe_blocks(model)
    pairs = [torch.zeros((b.num_experts,) * 2, dtype=torch.float64) for b in blocks]

    def see(place: int, chosen_TK: Tensor, _: Tensor) -> None:
        pairs[place] += count_pairs(chosen_TK, len(pairs[place]))

    with watch_selections(blocks, see):
        yield pairs


def count_pairs(chosen_TK: Tensor, num_experts: int) -> Tensor:
    """How many tokens selected both of two experts [E, E], on the diagonal how many selected the
    one; float64, so that counts of many batches add up exactly."""
    mask_TE = torch.zeros(len(chosen_TK), num_experts, device=chosen_TK.device)
    mask_TE.scatter_(1, chosen_TK.long(), 1)
    return (mask_TE.T @ mask_TE).to("cpu", torch.float64)


def utilisation(count_E: Tensor) -> list[float]:
    """Each expert's share of the selections over the fair share."""
    fair = count_E.sum() / len(count_E)
    return [round(float(n), 4) for n in count_E / fair]


def relative_entropy(count_E: Tensor) -> float:
    """Entropy of the shares of the selections, over log E; a lone expert has 1."""
    if len(count_E) == 1:
        return 1.0
    share_E = count_E.double() / count_E.sum()
    # xlogy gives a dead expert's term its limit, 0.
    return abs(float(share_E.xlogy(share_E).sum())) / math.log(len(share_E))


def co_selection(pairs_EE: Tensor, tokens: int) -> Tensor:
    """Selections of both experts, over what independence would give; see `LayerRouting`."""
    count_E = pairs_EE.diagonal()
    ratio_EE = pairs_EE * tokens / (count_E[:, None] * count_E).clamp(min=1)
    ratio_EE.diagonal().copy_(count_E > 0)
    return ratio_EE


def pair_counts(layer: LayerRouting, top_k: int, tokens: int) -> Tensor:
    """What `count_pairs` counted, [E, E], from the statistics that were made of it."""
    share_E = torch.tensor(layer.load, dtype=torch.float64) * top_k / len(layer.load)
    ratio_EE = torch.tensor(layer.co_selection, dtype=torch.float64)
    count_EE = ratio_EE * share_E[:, None] * share_E * tokens
    count_EE.diagonal().copy_(share_E * tokens)
    return count_EE.round()


def independent_pairs(count_E: Tensor, top_k: int, tokens: int) -> Tensor:
    """How many tokens would select both of two experts [E, E], if nothing were known but how many
    select each and that all select K different ones, at least two; 0 on the diagonal.

    The distribution of largest entropy: a set of K experts is as likely as the product of its
    experts' weights (conditional Poisson sampling; Chen, Dempster and Liu 1994). Products of shares
    would not do: with an expert that is nearly always on, they call every pair of popular experts
    remarkable.
    """
    experts, share_E = len(count_E), (count_E / tokens).clamp(0.1 / tokens, 1 - 0.1 / tokens)
    one_EE = torch.eye(experts, dtype=torch.float64)
    allowed_NE = torch.cat([1 - one_EE, torch.ones_like(one_EE[:1])])
    weights_E = share_E / (1 - share_E)
    for _ in range(FIT_ROUNDS):
        sums_NS = _sums_over_sets(weights_E, allowed_NE, top_k)
        weights_E = share_E * sums_NS[-1, top_k] / sums_NS[:-1, top_k - 1]
        weights_E = weights_E / weights_E.median()
    total = _sums_over_sets(weights_E, allowed_NE[-1:], top_k)[0, top_k]
    pairs_EE = torch.zeros_like(one_EE)
    for pair_2N in torch.triu_indices(experts, experts, 1).split(PAIRS_AT_ONCE, dim=1):
        i_N, j_N = pair_2N
        sums_NS = _sums_over_sets(weights_E, 1 - one_EE[i_N] - one_EE[j_N], top_k - 2)
        pairs_EE[i_N, j_N] = tokens * weights_E[i_N] * weights_E[j_N] * sums_NS[:, -1] / total
    return pairs_EE + pairs_EE.T


def _sums_over_sets(weights_E: Tensor, allowed_NE: Tensor, size: int) -> Tensor:
    """Over all sets of s allowed experts, the products of their weights, added up: [N, S] for s
    from 0 to size."""
    sums_NS = torch.zeros(len(allowed_NE), size + 1, dtype=torch.float64)
    sums_NS[:, 0] = 1
    for weight_N1 in (weights_E[:, None] * allowed_NE.T)[..., None]:
        sums_NS[:, 1:] += weight_N1 * sums_NS[:, :-1]
    return sums_NS
