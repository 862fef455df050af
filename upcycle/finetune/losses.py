"""Losses of continued training: pure functions of logits. Masked tokens (padding) never count.

B sequences of L tokens, V words. Losses of routers are plug-ins, in `router_losses`.
"""

import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits_BLV: Tensor, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean negative log-likelihood of each sequence's tokens, the first one given."""
    flat = F.cross_entropy(
        logits_BLV[:, :-1].flatten(0, 1).float(), tokens_BL[:, 1:].flatten(), reduction="none"
    )
    return _mean(flat, mask_BL[:, 1:].flatten())


def distillation_loss(logits_BLV: Tensor, teacher_BLV: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean KL(teacher ‖ model) of the next-token distributions, in nats (arXiv:1503.02531)."""
    log_probs_BLV = logits_BLV.float().log_softmax(-1)
    expected_BLV = teacher_BLV.float().log_softmax(-1)
    gap_BL = F.kl_div(log_probs_BLV, expected_BLV, log_target=True, reduction="none").sum(-1)
    return _mean(gap_BL, mask_BL)


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
