"""How tokens spread over experts: statistics of which experts were selected together."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
    return float(-share_E.xlogy(share_E).sum()) / math.log(len(share_E))


def co_selection(pairs_EE: Tensor, tokens: int) -> Tensor:
    """Selections of both experts, over what independence would give; see `LayerRouting`."""
    count_E = pairs_EE.diagonal()
    ratio_EE = pairs_EE * tokens / (count_E[:, None] * count_E).clamp(min=1)
    ratio_EE.diagonal().copy_(count_E > 0)
    return ratio_EE
