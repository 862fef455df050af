"""LLaMA-MoE's balance: the squared coefficients of variation of experts' importance and load.

Zhu et al., EMNLP 2024, arXiv:2406.16554, after Shazeer et al., ICLR 2017, arXiv:1701.06538.
Importance is the sum of an expert's weights, of the selected experts alone, as they count with the
noise. Load can be learnt only where noise selects (gating `noisy_top_k`): it is then the sum of the
probabilities that, with the noise drawn once more, a token selects the expert; else importance
alone is balanced. Departure: the authors' code asks whether the noise alone exceeds the threshold,
here the noisy logit does, as in Shazeer's.
"""

import math

import torch
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.finetune.router_losses.base import Seen, router_loss

SMALLEST = 1e-10
"""Added to the squared mean."""


def importance_and_load(seen: Seen, params: Params) -> Tensor:
    """The mean weight of each expert and, where noise selects, the probability that it is selected:
    [1 or 2, E]."""
    own_TK = seen.weighing_TE.gather(1, seen.chosen_TK)
    weights_TK = own_TK / own_TK.sum(-1, keepdim=True)
    weights_TE = torch.zeros_like(seen.scores_TE).scatter(1, seen.chosen_TK, weights_TK)
    rows = [seen.mean(weights_TE)]
    if seen.noisy_TE is not None:
        top_k = seen.chosen_TK.shape[1]
        rows.append(seen.mean(selected(seen.clean_TE, seen.noisy_TE, seen.noise, top_k)))
    return torch.stack(rows)


def selected(clean_TE: Tensor, noisy_TE: Tensor, noise: float, top_k: int) -> Tensor:
    """The probability that each expert would be among the `top_k`, were its own noise drawn again:
    [T, E]."""
    top_TK = noisy_TE.topk(top_k + 1, dim=-1).values
    last_in_T1, first_out_T1 = top_TK[:, -2:-1], top_TK[:, -1:]
    threshold_TE = torch.where(noisy_TE > first_out_T1, first_out_T1, last_in_T1)
    return torch.erf((clean_TE - threshold_TE) / (noise * math.sqrt(2))) / 2 + 0.5


@router_loss(
    "cv2",
    summary="squared coefficients of variation of experts' weights and, with noise, of their load",
    paper="arXiv:2406.16554",
    statistic=importance_and_load,
)
def cv2(use_SE: Tensor, params: Params) -> Tensor:
    return (use_SE.var(-1) / (use_SE.mean(-1).square() + SMALLEST)).sum()
