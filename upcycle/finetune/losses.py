"""Losses of continued training: pure functions of logits. Masked tokens (padding) never count.

B sequences of L tokens, V words; T tokens of all sequences, E experts, K selected per token.
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


def balance_loss(scores_TE: Tensor, count_E: Tensor, mask_T: Tensor) -> Tensor:
    """Load balancing of Switch Transformers (arXiv:2101.03961): E Σₑ fₑ Pₑ, with f the share of
    the selections that fall on an expert and P its mean score; 1 when both are uniform. (The
    losses of transformers and Megatron are K times this one, of K experts per token.)

    Args:
        scores_TE: normalised to add up to 1 for each token.
        count_E: selections of each expert, of these tokens or of more (arXiv:2501.11873).
    """
    weight_T = mask_T.float() / mask_T.sum()
    return scores_TE.shape[-1] * (count_E / count_E.sum() * (weight_T @ scores_TE)).sum()


def router_z_loss(logits_TE: Tensor, mask_T: Tensor) -> Tensor:
    """Mean squared log-partition of the router (ST-MoE, arXiv:2202.08906): keeps logits small."""
    return _mean(logits_TE.logsumexp(-1).square(), mask_T)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()
