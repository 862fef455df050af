"""Validation: the held-out text, measured while a run trains."""

import math

import torch

from upcycle.finetune import losses
from upcycle.finetune.state import save_tensors, trained_tensors
from upcycle.finetune.step import Progress, Setup, check_finite, note

LARGEST_LOSS = 690.0
"""Whose exponential the log still takes."""


@torch.no_grad()
def validate(setup: Setup, progress: Progress) -> None:
    """Measure on the held-out sequences, and keep the state if it is the best so far.

    Raises:
        Diverged: the loss is not a number.
    """
    accelerator, settings = setup.accelerator, setup.settings
    setup.model.eval()
    sums = torch.zeros(4, device=accelerator.device)
    rows = torch.arange(len(setup.validation))
    # Every process must run the model equally often.
    world = accelerator.num_processes
    padded = torch.cat([rows, rows[:1].expand(-len(rows) % world)])
    for number, row in enumerate(padded[accelerator.process_index :: world].tolist()):
        batch = setup.validation.take(torch.tensor([row]))
        tokens_BL, scored_BL, foretelling_BL = (
            each.to(accelerator.device)
            for each in (batch.tokens_BL, batch.scored_BL, batch.foretelling_BL)
        )
        with accelerator.autocast():
            logits_BLV = setup.model(input_ids=tokens_BL, use_cache=False).logits
        means = [1.0, float(losses.next_token_loss(logits_BLV, tokens_BL, scored_BL)), 0.0, 0.0]
        if setup.teacher is not None:
            with accelerator.autocast():
                expected_BLV = setup.teacher(input_ids=tokens_BL, use_cache=False).logits
            means[2] = float(losses.next_token_loss(expected_BLV, tokens_BL, scored_BL))
            means[3] = float(losses.distillation_loss(logits_BLV, expected_BLV, foretelling_BL))
        counts = number * world + accelerator.process_index < len(rows)
        weight = batch.scored * counts
        sums += weight * torch.tensor(means, device=sums.device)
    setup.model.train()
    summed = accelerator.reduce(sums, "sum")
    loss, teacher_loss, kl = (summed[1:] / summed[0]).tolist()
    measured = {"loss": loss, "perplexity": math.exp(min(loss, LARGEST_LOSS))}
    objective = loss
    if setup.teacher is not None:
        ratio = math.exp(min(loss - teacher_loss, LARGEST_LOSS))
        measured |= {"perplexity_ratio": ratio, "kl": kl}
        if settings.distill:
            objective = settings.next_token * loss + settings.distill * kl
    check_finite(setup, {"validation loss": objective} | measured, progress.step)
    if settings.keep_best and objective < progress.best:
        progress.best, progress.best_step = objective, progress.step
        tensors = trained_tensors(setup.plain)
        if accelerator.is_main_process:
            save_tensors(setup.folder / "best.safetensors", tensors, {"step": progress.step})
        accelerator.wait_for_everyone()
    note(setup, progress, {"step": progress.step, "validation": measured})
