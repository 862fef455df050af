"""The training loop: steps, validation, and a state that goes on bit by bit.

Everything that a step does follows from its number, so a run that stops after any step and goes on
from its saved state ends in the same weights.
"""

import json
import time

import torch
from safetensors.torch import load_file
from torch import nn

from upcycle.finetune.settings import Training
from upcycle.finetune.state import load_state, put_back, read_notes, save_state
from upcycle.finetune.step import Run, note, take_step
from upcycle.finetune.trainable import Trained
from upcycle.finetune.validation import validate
from upcycle.models.record import LogLine, log_text


def make_optimizer(settings: Training, training: list[Trained]) -> torch.optim.AdamW:
    """AdamW with one group per learning rate; matrices other than routers decay, all by the same
    share of themselves a step, whatever the scale of their learning rate."""
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for item in training:
        router = item.member.group == "router"
        lr = (settings.router_lr or settings.lr) if router else settings.lr
        decays = item.parameter.dim() > 1 and not router
        decay = settings.weight_decay / item.scale if decays else 0.0
        key = ("router" if router else "other", lr * item.scale, decay)
        groups.setdefault(key, []).append(item.parameter)
    return torch.optim.AdamW(
        [
            {"params": params, "part": part, "base_lr": lr, "lr": lr, "weight_decay": decay}
            for (part, lr, decay), params in groups.items()
        ],
        betas=(0.9, 0.95),
    )


def train(run: Run) -> None:
    """Run all steps that are left, from the saved state if there is one.

    Raises:
        Diverged: a loss or a gradient is no number.
        KeyboardInterrupt: the run was told to stop; its state is saved.
    """
    _take_up(run)
    total = run.settings.total_steps
    every = run.settings.validate_every or max(1, total // 10)
    if run.step == 0:
        validate(run)
    while run.step < total:
        start = time.monotonic()
        row = take_step(run)
        run.step += 1
        seconds = time.monotonic() - start
        run.seconds += seconds
        tokens = row.pop("tokens")
        note(run, row | {"tokens_per_second": round(tokens / seconds, 1)})
        due = run.step % every == 0 or run.step == total
        if due:
            validate(run)
        stop = _told_to_stop(run)
        if due or stop:
            _save(run)
        if stop and run.step < total:
            raise KeyboardInterrupt


def restore_best(run: Run) -> None:
    """Make the model what the result shall be."""
    if run.settings.keep_best and run.best_step != run.step:
        put_back(run.plain, load_file(run.folder / "best.safetensors"))


def _told_to_stop(run: Run) -> bool:
    """Whether any process was: all must leave after the same step."""
    if run.accelerator.num_processes == 1:
        return run.stop
    told = torch.tensor(float(run.stop), device=run.accelerator.device)
    return bool(run.accelerator.reduce(told, "sum"))


def _take_up(run: Run) -> None:
    notes = read_notes(run.folder)
    if notes is not None:
        load_state(run.folder, run.plain, run.optimizer)
        run.step, run.seconds = notes["step"], notes["seconds"]
        run.best, run.best_step = float(notes["best"]), notes["best_step"]
    lines = run.log_file.read_text().splitlines(True) if notes and run.log_file.exists() else []
    # A kill may have cut the last line short.
    rows = [LogLine(**json.loads(line)).plain() for line in lines if line.endswith("\n")]
    run.log = [row for row in rows if row["step"] <= run.step]
    if run.accelerator.is_main_process:
        run.log_file.write_text("".join(map(log_text, run.log)))


def _save(run: Run) -> None:
    notes = {
        "step": run.step,
        "seconds": run.seconds,
        "best": run.best,
        "best_step": run.best_step,
    }
    main = run.accelerator.is_main_process
    save_state(run.folder, run.plain, run.optimizer, notes, write=main)
    run.accelerator.wait_for_everyone()
