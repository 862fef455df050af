"""The training loop: steps, validation, and a state that goes on bit by bit.

Everything that a step does follows from its number, so a run that stops after any step and goes on
from its saved state ends in the same weights.
"""

import json
import time

import torch
from safetensors.torch import load_file
from torch import nn

from upcycle.finetune.budget import budget
from upcycle.finetune.partition import Dealer
from upcycle.finetune.settings import Training
from upcycle.finetune.setup import Progress, Setup, note
from upcycle.finetune.state import load_state, put_back, read_notes, save_state
from upcycle.finetune.step import pass_of, take_step
from upcycle.finetune.trainable import Trained
from upcycle.finetune.validation import look, validate
from upcycle.models.train_log import LogLine, log_text


def make_optimizer(settings: Training, training: list[Trained]) -> torch.optim.AdamW:
    """AdamW with one group per part and learning rate; matrices other than routers decay, all by
    the same share of themselves a step, whatever the scale of their learning rate."""
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for item in training:
        router = item.member.group == "router"
        lr = (settings.router_lr or settings.rate) if router else settings.rate
        decays = item.parameter.dim() > 1 and not router
        decay = settings.weight_decay / item.scale if decays else 0.0
        key = (item.member.part, lr * item.scale, decay)
        groups.setdefault(key, []).append(item.parameter)
    return torch.optim.AdamW(
        [
            {"params": params, "part": part, "base_lr": lr, "lr": lr, "weight_decay": decay}
            for (part, lr, decay), params in groups.items()
        ],
        betas=(0.9, 0.95),
        fused=True,
    )


def train(setup: Setup, progress: Progress) -> None:
    """Run all steps that are left, from the saved state if there is one.

    Raises:
        Diverged: a loss or a gradient is no number.
        KeyboardInterrupt: the run was told to stop; its state is saved.
    """
    _take_up(setup, progress)
    total = setup.settings.total_steps
    every = setup.settings.validation_steps
    validated = None
    if progress.step == 0:
        start = time.monotonic()
        validate(setup, progress)
        validated = time.monotonic() - start
    while progress.step < total:
        start = time.monotonic()
        row = take_step(setup, progress.step)
        progress.step += 1
        seconds = time.monotonic() - start
        progress.seconds += seconds
        tokens = row.pop("tokens")
        note(setup, progress, row | {"tokens_per_second": round(tokens / seconds, 1)})
        if progress.step == 1 and validated is not None:
            ratio = progress.log[0]["validation"].get("perplexity_ratio")
            setup.say_budget(budget(setup.settings, look(setup, seconds, validated, ratio)))
        due = progress.step % every == 0 or progress.step == total
        if due:
            validate(setup, progress)
        stop = _told_to_stop(setup, progress)
        if due or stop or progress.step % setup.settings.saving_steps == 0:
            _save(setup, progress)
        if stop and progress.step < total:
            raise KeyboardInterrupt


def restore_best(setup: Setup, progress: Progress) -> None:
    """Make the model what the result shall be."""
    if setup.settings.keep_best and progress.best_step != progress.step:
        put_back(setup.plain, load_file(setup.folder / "best.safetensors"))


def settle(setup: Setup, progress: Progress) -> None:
    """Make the model one of its class, where something else was learnt."""
    if isinstance(setup.gater, Dealer):
        kept = progress.best_step if setup.settings.keep_best else progress.step
        setup.gater.now = pass_of(setup, max(0, kept - 1))
        setup.gater.settle()


def _told_to_stop(setup: Setup, progress: Progress) -> bool:
    """Whether any process was: all must leave after the same step."""
    if setup.accelerator.num_processes == 1:
        return progress.stop
    told = torch.tensor(float(progress.stop), device=setup.accelerator.device)
    return bool(setup.accelerator.reduce(told, "sum"))


def _take_up(setup: Setup, progress: Progress) -> None:
    notes = read_notes(setup.folder)
    if notes is not None:
        load_state(setup.folder, setup.plain, setup.optimizer)
        progress.step, progress.seconds = notes["step"], notes["seconds"]
        progress.best, progress.best_step = float(notes["best"]), notes["best_step"]
        setup.router_terms.coefficients = notes["coefficients"]
    lines = setup.log_file.read_text().splitlines(True) if notes and setup.log_file.exists() else []
    # A kill may have cut the last line short.
    rows = [LogLine(**json.loads(line)).plain() for line in lines if line.endswith("\n")]
    progress.log = [row for row in rows if row["step"] <= progress.step]
    progress.alarmed = {a["about"] for row in progress.log for a in row.get("alarms", ())}
    if setup.accelerator.is_main_process:
        setup.log_file.write_text("".join(map(log_text, progress.log)))


def _save(setup: Setup, progress: Progress) -> None:
    notes = {
        "step": progress.step,
        "seconds": progress.seconds,
        "best": progress.best,
        "best_step": progress.best_step,
        "coefficients": setup.router_terms.coefficients,
    }
    main = setup.accelerator.is_main_process
    save_state(setup.folder, setup.plain, setup.optimizer, notes, write=main)
    setup.accelerator.wait_for_everyone()
