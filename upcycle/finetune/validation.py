"""Validation: the held-out text, measured while a run trains."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from upcycle.finetune import losses
from upcycle.finetune.alarms import STARVED
from upcycle.finetune.budget import Look
from upcycle.finetune.checks import check_finite
from upcycle.finetune.data import Data
from upcycle.finetune.setup import Progress, Row, Setup, note
from upcycle.finetune.state import save_tensors, trained_tensors
from upcycle.finetune.step import count
from upcycle.models.record.training import Used

LARGEST_LOSS = 690.0
"""Whose exponential the log still takes."""


def validate(setup: Setup, progress: Progress) -> None:
    """Measure on the held-out sequences, and keep the state if it is the best so far.

    Raises:
        Diverged: a loss is not a number.
    """
    accelerator, settings = setup.accelerator, setup.settings
    row = measure(setup)
    measured, texts = row["validation"], row["texts"]
    objective = settings.objective(measured)
    each = {f"perplexity of {name}": perplexity for name, perplexity in texts.items()}
    check_finite(setup, {"validation loss": objective} | measured | each, progress.step)
    if settings.keep_best and objective < progress.best:
        progress.best, progress.best_step = objective, progress.step
        tensors = trained_tensors(setup.plain)
        if accelerator.is_main_process:
            save_tensors(setup.folder / "best.safetensors", tensors, {"step": progress.step})
        accelerator.wait_for_everyone()
    note(setup, progress, {"step": progress.step} | row)


@torch.no_grad()
def measure(setup: Setup) -> Row:
    """Of the held-out sequences: losses of what is trained on, the perplexity of each text, and how
    the routers, if there are any, share the tokens out."""
    accelerator, rows = setup.accelerator, torch.arange(len(setup.validation))
    setup.model.eval()
    sums_X4 = torch.zeros(len(setup.validation.used), 4, device=accelerator.device)
    counts = [torch.zeros(block.num_experts, device=accelerator.device) for block in setup.blocks]
    # Every process must run the model equally often.
    world = accelerator.num_processes
    padded = torch.cat([rows, rows[:1].expand(-len(rows) % world)])
    for number, row in enumerate(padded[accelerator.process_index :: world].tolist()):
        batch = setup.validation.take(torch.tensor([row]))
        counted = number * world + accelerator.process_index < len(rows)
        means_4 = _means(setup, batch, counts if counted else None)
        sums_X4[int(batch.text_B)] += counted * batch.scored * means_4
    setup.model.train()
    summed_X4 = accelerator.reduce(sums_X4, "sum")
    counts = [accelerator.reduce(count_E, "sum") for count_E in counts]
    names, trained = _distinct(setup.validation.used), len(setup.train.used)
    means_X4 = zip(names, summed_X4 / summed_X4[:, :1], strict=True)
    row = {
        "validation": _losses(setup, summed_X4[:trained].sum(0)),
        "texts": {name: _exp(float(means_4[1])) for name, means_4 in means_X4},
    }
    return row | {"routing": _routing(setup, counts)} if counts else row


def look(setup: Setup, step: float, validation: float, ratio: float | None) -> Look:
    """What is known of a run by the seconds of a step and of the validation before it.

    Args:
        ratio: perplexity over the teacher's, by that validation.
    """
    return Look(
        settings=setup.settings,
        trained=len(setup.train),
        tokens=_tokens_of_text(setup),
        held=len(setup.validation),
        held_tokens=int(setup.validation.mask_BL.sum()),
        step_seconds=step,
        validation_seconds=validation,
        sequence_seconds=0.0 if setup.teacher is None else setup.teacher.seconds,
        ratio=ratio,
    )


def _tokens_of_text(setup: Setup) -> int | None:
    """That there are to train on, used or not."""
    used, settings = setup.train.used, setup.settings
    if len(setup.train) < settings.total_steps * settings.batch_size:  # all of them
        return sum(text.tokens for text in used)
    if any(text.total is None for text in used):
        return None
    return sum((text.total or 0) - text.held_out for text in used)


def _means(setup: Setup, batch: Data, counts: list[Tensor] | None) -> Tensor:
    """Of a sequence: 1, its loss, the teacher's, and the divergence from it; its selections are
    added to the counts, if there are any."""
    accelerator = setup.accelerator
    tokens_BL, scored_BL, foretelling_BL = (
        each.to(accelerator.device)
        for each in (batch.tokens_BL, batch.scored_BL, batch.foretelling_BL)
    )
    with setup.tap.recording(), accelerator.autocast():
        logits_BLV = setup.model(input_ids=tokens_BL, use_cache=False).logits
    if counts is not None:
        count(setup, batch.mask_BL.flatten().to(accelerator.device), counts)
    means = [1.0, float(losses.next_token_loss(logits_BLV, tokens_BL, scored_BL)), 0.0, 0.0]
    if setup.teacher is not None:
        store = setup.teacher.held
        kept = store.kept(batch.place_B, accelerator.device)
        means[2] = store.loss(int(batch.place_B), batch.scored)
        means[3] = float(losses.kept_distillation_loss(logits_BLV[foretelling_BL], kept))
    return torch.tensor(means, device=accelerator.device)


def _losses(setup: Setup, sums_4: Tensor) -> dict[str, float]:
    loss, teacher_loss, kl = (sums_4[1:] / sums_4[0]).tolist()
    measured = {"loss": loss, "perplexity": _exp(loss)}
    if setup.teacher is not None:
        measured |= {"perplexity_ratio": _exp(loss - teacher_loss), "kl": kl}
    return measured


def _routing(setup: Setup, counts: list[Tensor]) -> dict[str, Any]:
    """How the held-out tokens were shared out, of all layers."""
    experts = sum(map(len, counts))
    loads = [count_E / count_E.mean() for count_E in counts]
    top_ks = [routed.weights_TK.shape[1] for routed in setup.tap.routed]
    worst = [len(count_E) / top_k for count_E, top_k in zip(counts, top_ks, strict=True)]
    return {
        "experts": experts,
        "starved": sum(int((load_E < STARVED).sum()) for load_E in loads),
        "imbalance": sum(float(load_E.max()) for load_E in loads) / len(loads),
        "worst_imbalance": sum(worst) / len(worst),
    }


def _distinct(used: Sequence[Used]) -> list[str]:
    """The texts' names; of files in several folders the same one may come again."""
    names: list[str] = []
    for text in used:
        again = sum(text.text == other.text for other in used[: len(names)])
        names.append(f"{text.text} ({again + 1})" if again else text.text)
    return names


def _exp(loss: float) -> float:
    return math.exp(min(loss, LARGEST_LOSS))
