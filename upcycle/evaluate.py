"""How good a model is on text, alone and against the dense model it was made from.

Protocol: the text is cut into windows of the same length, each is read on its own, and the first
token of a window is given. Perplexity is the exponential of the mean over windows. One model is in
memory at a time.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from upcycle.calibrate import check_text, packed_tokens
from upcycle.errors import CheckFailed
from upcycle.moe import moe_blocks, watch_selections
from upcycle.source import checkpoint_folder, read_config

Step = Callable[[int], None]
"""Told how many windows are done."""


@dataclass(frozen=True)
class Reference:
    """What the dense model says of each window."""

    perplexity: float
    log_probs: list[Tensor]
    """Per window [L, V], in float16, which halves the memory but makes ties; hence also: """
    top: list[Tensor]
    """Per window, the most likely next token [L]."""


@dataclass(frozen=True)
class Comparison:
    """A model beside its reference."""

    perplexity: float
    kl: float
    """Mean KL(reference ‖ model) per token, in nats."""
    top1_agreement: float
    """Share of tokens whose most likely next token is the same."""
    load: list[list[float]]
    """Per MoE layer and expert: its share of the tokens over the fair share, K / E."""
    router_weights: list[float]
    """Per call of a router, the mean over tokens of the selected experts' weights, added up."""


@dataclass(frozen=True)
class Evaluation:
    """A model's numbers on one text; those against another model are None without one."""

    perplexity: float
    perplexity_against: float | None
    kl: float | None
    top1_agreement: float | None
    load: list[list[float]]
    tokens: int
    window: int

    @property
    def perplexity_ratio(self) -> float | None:
        against = self.perplexity_against
        return None if against is None else self.perplexity / against


def evaluate(
    model: str,
    text: str,
    *,
    against: str | None = None,
    tokens: int = 16384,
    seq_len: int = 512,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Evaluation:
    """Evaluate a checkpoint on a text, alone or beside the dense model it was made from.

    Args:
        model, against: folders, hub ids or GGUF files; both must share a tokenizer.
        text: a file, `builtin` or `hf:…`, as for calibration.
        tokens: how many, from the text's start.

    Raises:
        UpcycleError: a model or the text can't be read.
        CheckFailed: a checkpoint does not load whole.
    """
    check_text(text, "--text")
    place = torch.device(device)
    with checkpoint_folder(model) as folder:
        vocab_size = read_config(folder).vocab_size
        windows = max(1, tokens // seq_len)
        tokens_BL = packed_tokens(folder, vocab_size, text, windows, seq_len)
        total = windows * (1 if against is None else 2)
        reference = None
        if against is not None:
            with checkpoint_folder(against) as dense:
                reference = measure_reference(
                    load_model(dense, dtype, place),
                    tokens_BL,
                    lambda done: progress("evaluating", done, total),
                )
        measured = compare(
            load_model(folder, dtype, place),
            tokens_BL,
            reference,
            lambda done: progress("evaluating", total - windows + done, total),
        )
    progress("evaluating", total, total)
    return Evaluation(
        perplexity=measured.perplexity,
        perplexity_against=reference.perplexity if reference else None,
        kl=measured.kl if reference else None,
        top1_agreement=measured.top1_agreement if reference else None,
        load=measured.load,
        tokens=tokens_BL.numel(),
        window=seq_len,
    )


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The checkpoint by plain transformers.

    Raises:
        CheckFailed: it does not load, or not every tensor finds its place.
    """
    with warnings.catch_warnings():
        # A target that always has a shared expert holds one of no neurons.
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True
            )
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise CheckFailed(f"{folder} does not load in transformers: {reason}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise CheckFailed(f"{folder} does not load whole: {kind} {sorted(info[kind])[:3]}")
    return model.to(device).eval()


@torch.no_grad()
def next_token_logits(model: Any, window_L: Tensor) -> Tensor:
    """Logits [L, V] in float32 for one window of tokens [L]."""
    logits: Tensor = (
        model(input_ids=window_L[None].to(model.device), use_cache=False).logits[0].float()
    )
    return logits


def measure_reference(model: Any, tokens_BL: Tensor, step: Step) -> Reference:
    """Run the dense model over the windows [B, L]."""
    loss, log_probs, top = 0.0, [], []
    for i, window_L in enumerate(tokens_BL):
        step(i)
        log_probs_LV = next_token_logits(model, window_L).log_softmax(-1)
        loss += _loss(log_probs_LV, window_L)
        log_probs.append(log_probs_LV.to("cpu", torch.float16))
        top.append(log_probs_LV.argmax(-1).cpu())
    return Reference(math.exp(loss / len(tokens_BL)), log_probs, top)


def compare(model: Any, tokens_BL: Tensor, reference: Reference | None, step: Step) -> Comparison:
    """Run a model over the windows [B, L] that its reference has seen; without a reference, KL and
    agreement stay 0."""
    loss = kl = agreement = 0.0
    blocks = moe_blocks(model)
    counts = [torch.zeros(block.num_experts, dtype=torch.int64) for block in blocks]
    weights: list[float] = []

    def see(place: int, chosen_TK: Tensor, weights_TK: Tensor) -> None:
        counts[place] += chosen_TK.flatten().cpu().bincount(minlength=len(counts[place]))
        weights.append(weights_TK.float().sum(-1).mean().item())

    with watch_selections(blocks, see):
        for i, window_L in enumerate(tokens_BL):
            step(i)
            log_probs_LV = next_token_logits(model, window_L).log_softmax(-1).cpu()
            loss += _loss(log_probs_LV, window_L)
            if reference is None:
                continue
            expected_LV = reference.log_probs[i].float().log_softmax(-1)
            gap_LV = expected_LV.exp() * (expected_LV - log_probs_LV)
            kl += gap_LV.sum(-1).mean().item()
            agreement += (log_probs_LV.argmax(-1) == reference.top[i]).float().mean().item()
    windows = len(tokens_BL)
    return Comparison(
        perplexity=math.exp(loss / windows),
        kl=kl / windows,
        top1_agreement=agreement / windows,
        load=[_utilisation(count_E) for count_E in counts],
        router_weights=weights,
    )


def _loss(log_probs_LV: Tensor, window_L: Tensor) -> float:
    """Mean negative log-likelihood of a window's tokens, the first one given."""
    targets = window_L[1:, None].to(log_probs_LV.device)
    return float(-log_probs_LV[:-1].gather(1, targets).mean())


def _utilisation(count_E: Tensor) -> list[float]:
    fair = count_E.sum() / len(count_E)
    return [round(float(n), 4) for n in count_E / fair]
