"""A model on windows of text, beside a dense one that has read the same."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upcycle.core.progress import Progress
from upcycle.evaluation.routing import counting_pairs, utilisation
from upcycle.models.head import Decoded, decode, given

Step = Callable[[int], None]
"""Told how many windows are done."""
CHUNK = 2**24
"""Logits that are computed at once; of some windows and vocabularies all would take gigabytes."""


@dataclass(frozen=True)
class Comparison:
    """A model's numbers on a text, beside those of a reference if there is one."""

    losses: list[float]
    """Per window, the mean negative log-likelihood of its tokens, in nats."""
    losses_against: list[float]
    """The reference's."""
    kl: float
    """Mean KL(reference ‖ model) per token, in nats."""
    top1_agreement: float
    """Share of tokens whose most likely next token is the same."""
    pairs: list[Tensor]
    """Per MoE layer, how many tokens selected both of two experts [E, E]."""

    @property
    def perplexity(self) -> float:
        return _exp(_doubles(self.losses).mean())

    @property
    def perplexity_against(self) -> float:
        return _exp(_doubles(self.losses_against).mean())

    @property
    def worst_window_ratio(self) -> float:
        """The largest ratio of perplexities, model over reference, of any window."""
        return _exp((_doubles(self.losses) - _doubles(self.losses_against)).max())

    @property
    def load(self) -> list[list[float]]:
        """Per MoE layer and expert: its share of the tokens over the fair share, K / E."""
        return [utilisation(pairs_EE.diagonal()) for pairs_EE in self.pairs]


def counter(progress: Progress, total: int) -> Step:
    """Tells `progress` of every window of all texts and models."""
    windows = itertools.count()
    return lambda _: progress("evaluating", next(windows), total)


@torch.no_grad()
def next_token_logits(model: Any, window_L: Tensor) -> Tensor:
    """Logits [T, V] in float32 of all tokens in one window [L] that tell the next."""
    logits: Tensor = model(**given(model, window_L), use_cache=False).logits[0].float()
    return logits


def decode_windows(model: Any, tokens_BL: Tensor, step: Step) -> list[Decoded]:
    """Run a dense model's decoder over the windows [B, L], to be the reference of `compare`."""
    decoded = []
    for i, window_L in enumerate(tokens_BL):
        step(i)
        decoded.append(decode(model, window_L))
    return decoded


def compare(
    model: Any, tokens_BL: Tensor, reference: list[Decoded] | None, step: Step
) -> Comparison:
    """Run a model over the windows [B, L] that its reference has seen; without a reference, KL and
    agreement stay 0, and there are no losses of one."""
    windows: list[list[float]] = []
    with counting_pairs(model) as pairs:
        for i, window_L in enumerate(tokens_BL):
            step(i)
            dense = None if reference is None else reference[i]
            windows.append(_compare_window(decode(model, window_L), dense))
    losses, losses_against, kl, agreement = zip(*windows, strict=True)
    return Comparison(
        losses=list(losses),
        losses_against=[] if reference is None else list(losses_against),
        kl=max(sum(kl) / len(kl), 0.0),  # NaN stays; of copies, rounding leaves less than none
        top1_agreement=sum(agreement) / len(agreement),
        pairs=pairs,
    )


def _compare_window(own: Decoded, dense: Decoded | None) -> list[float]:
    """A window's loss, the dense model's, KL and agreement, each the mean over its tokens."""
    length, sums = len(own.tokens_T), torch.zeros(4, dtype=torch.float64)
    rows = max(1, CHUNK // own.model.config.get_text_config().vocab_size)
    for start in range(0, length, rows):
        some = slice(start, start + rows)
        targets_T = own.tokens_T[start + 1 : start + rows + 1]
        own_TV = own.logits(some)
        own_top_T, own_TV = own_TV.argmax(-1), own_TV.log_softmax(-1)
        sums[0] += _loss(own_TV, targets_T)
        if dense is None:
            continue
        dense_TV = dense.logits(some)
        sums[3] += int((dense_TV.argmax(-1) == own_top_T).sum())
        dense_TV = dense_TV.log_softmax(-1)
        sums[1] += _loss(dense_TV, targets_T)
        sums[2] += _divergence(dense_TV, own_TV)
    return (sums / torch.tensor([length - 1, length - 1, length, length])).tolist()


def _loss(log_probs_TV: Tensor, targets_T: Tensor) -> float:
    """The negative log-likelihoods of the next tokens, added up; the last row may have none."""
    targets_T1 = targets_T[:, None].to(log_probs_TV.device)
    return -float(log_probs_TV[: len(targets_T)].gather(1, targets_T1).double().sum())


def _divergence(dense_TV: Tensor, own_TV: Tensor) -> float:
    """KL(dense ‖ own) of log-probabilities, added up over tokens. Overwrites both: a temporary of
    this size costs as much as what is done with it."""
    gap_TV = torch.sub(dense_TV, own_TV, out=own_TV)
    return float(gap_TV.mul_(dense_TV.exp_()).sum(-1).double().sum())


def _doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _exp(loss: Tensor) -> float:
    """Infinite where a float is too small for it."""
    return float(loss.exp())
