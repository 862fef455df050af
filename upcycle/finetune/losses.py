"""Losses of continued training: pure functions of logits. Masked tokens (padding) never count.

B sequences of L tokens, T tokens of all, V words, of which N are kept. Losses of routers are
plug-ins, in `router_losses`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits_BLV: Tensor, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean negative log-likelihood of each sequence's tokens, the first one given."""
    flat = F.cross_entropy(
        logits_BLV[:, :-1].flatten(0, 1).float(), tokens_BL[:, 1:].flatten(), reduction="none"
    )
    return _mean(flat, mask_BL[:, 1:].flatten())


def distillation_loss(
    logits_BLV: Tensor, teacher_BLV: Tensor, mask_BL: Tensor, temperature: float = 1.0
) -> Tensor:
    """Mean KL(teacher ‖ model) of the next-token distributions, in nats (arXiv:1503.02531).

    Args:
        temperature: that both logits are divided by. The divergence is multiplied by its square,
            so that the gradient stays as large.
    """
    log_probs_BLV = (logits_BLV.float() / temperature).log_softmax(-1)
    expected_BLV = (teacher_BLV.float() / temperature).log_softmax(-1)
    gap_BL = F.kl_div(log_probs_BLV, expected_BLV, log_target=True, reduction="none").sum(-1)
    return temperature**2 * _mean(gap_BL, mask_BL)


@dataclass(frozen=True)
class Kept:
    """Of T predictions the N likeliest words, by what they were divided by."""

    words_TN: Tensor
    log_probs_TN: Tensor
    rest_T: Tensor
    """Logarithm of all others' probability together; -inf where no word is left."""


def kept_words(logits_TV: Tensor, words: int, temperature: float = 1.0) -> Kept:
    """What is kept of the teacher's predictions.

    Args:
        words: N; all V, if there are no more.
    """
    log_probs_TV = (logits_TV.float() / temperature).log_softmax(-1)
    log_probs_TN, words_TN = log_probs_TV.topk(min(words, log_probs_TV.shape[1]))
    return Kept(words_TN, log_probs_TN, _rest(log_probs_TV, words_TN))


def kept_distillation_loss(logits_TV: Tensor, kept: Kept, temperature: float = 1.0) -> Tensor:
    """`distillation_loss` where all words that were not kept count as one: the same if all were,
    else no more than it.

    Args:
        temperature: that the kept words' logits were divided by.
    """
    log_probs_TV = (logits_TV.float() / temperature).log_softmax(-1)
    ours_TN = log_probs_TV.gather(1, kept.words_TN)
    gap_T = (kept.log_probs_TN.exp() * (kept.log_probs_TN - ours_TN)).sum(-1)
    if kept.words_TN.shape[1] < logits_TV.shape[1]:
        gap_T = gap_T + kept.rest_T.exp() * (kept.rest_T - _rest(log_probs_TV, kept.words_TN))
    return temperature**2 * gap_T.mean()


def _rest(log_probs_TV: Tensor, words_TN: Tensor) -> Tensor:
    """Logarithm of the probability of all other words together."""
    return log_probs_TV.scatter(1, words_TN, -torch.inf).logsumexp(-1)


def layer_match_loss(
    hidden: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask_BL: Tensor
) -> Tensor:
    """Mean over layers and tokens of the squared distance of the hidden states [B, L, D] after
    each layer from the teacher's, over the teacher's squared norm."""
    gaps = [
        _mean((h_BLD - t_BLD).square().sum(-1) / t_BLD.square().sum(-1), mask_BL)
        for h_BLD, t_BLD in zip(hidden, teacher, strict=True)
    ]
    return sum(gaps[1:], gaps[0]) / len(gaps)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()
