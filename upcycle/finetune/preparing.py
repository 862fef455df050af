"""Model, data, teacher and optimizer of a run: all that the loop needs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.finetune.activations import swap
from upcycle.finetune.budget import Budget
from upcycle.finetune.data import Data, batch_rows, training_data, with_texts
from upcycle.finetune.job import Job
from upcycle.finetune.loop import make_optimizer
from upcycle.finetune.partition import add_affinities
from upcycle.finetune.plugins import check_plugins, facts_of, gater_for, router_terms
from upcycle.finetune.router_losses.base import Facts
from upcycle.finetune.routers import RouterTap, keep_float32, measure_scales, score_of
from upcycle.finetune.settings import Training
from upcycle.finetune.setup import Row, Setup
from upcycle.finetune.state import torch_dtype
from upcycle.finetune.teacher import HELD_WORDS, Teacher, fill, is_stored, open_store
from upcycle.finetune.together import run_together
from upcycle.finetune.trainable import (
    Groups,
    add_lora,
    freeze_all_but,
    members,
    rate_unit,
    summary,
    trained,
)
from upcycle.models.blocks import MoEBlock, moe_blocks
from upcycle.models.config import read_config, read_text_config
from upcycle.models.config_fields import check_layers
from upcycle.models.loading import load_model
from upcycle.models.record.training import Used
from upcycle.models.shards import read_headers
from upcycle.models.stream import skeleton
from upcycle.models.train_log import TRAIN_LOG
from upcycle.models.workspace import ASIDE, partial_folder

SCALE_TOKENS = 256
"""Of the validation text, to measure routers on."""


@dataclass(frozen=True)
class Watch:
    """What is told of a run's progress."""

    begin: Callable[[Training, Groups, Sequence[Used]], None] = lambda settings, groups, used: None
    """Once, before the first step: what trains, and on how much of each text."""
    row: Callable[[Row, int, int], None] = lambda row, done, total: None
    """Every line of the log, with the steps done and all steps."""
    budget: Callable[[Budget], None] = lambda budget: None
    """After the first step of a run that is not resumed."""
    teacher: Callable[[int, int], None] = lambda done, total: None
    """While its predictions are stored: the sequences done, and all of them."""


def stored_words(job: Job) -> tuple[int, int]:
    """Of the teacher's predictions, per token that is trained on, 0 if it runs in every step, and
    per token that is validated on."""
    vocab_size = int(read_text_config(job.folder).vocab_size)
    return min(job.settings.teacher_top_k, vocab_size), min(HELD_WORDS, vocab_size)


def prepare(
    job: Job, accelerator: Accelerator, watch: Watch, steps: int | None = None
) -> tuple[Setup, Groups]:
    """Model, data, optimizer: all that the loop needs, for all steps or the first ones."""
    settings, folder = job.settings, job.folder
    train_data, validation = _data(job)
    facts = _facts(job, train_data, accelerator)
    teacher = _teacher(job, accelerator, train_data, validation, watch, steps)
    model = load_model(folder, _dtype(job), accelerator.device)
    blocks = moe_blocks(model)
    activations = settings.activation and swap(model, settings.activation, validation)
    keep_float32(blocks)
    run_together(blocks)
    window_1L = validation.tokens_BL[:1, :SCALE_TOKENS].to(accelerator.device)
    scales = measure_scales(model, blocks, window_1L)
    if settings.train == "partition":
        add_affinities(blocks)
    known = members(model, blocks, scales)
    settings = settings.with_rate(rate_unit(model, blocks, known))
    torch.manual_seed(settings.seed)  # low-rank changes start at random
    if settings.lora:
        model = add_lora(model, known, settings)
    else:
        freeze_all_but(model, known, settings)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    training = trained(model, known)
    score = score_of(model.config)
    terms = router_terms(settings, facts, blocks, scales, score)
    gater = gater_for(settings, facts, blocks, scales, score)
    tap = RouterTap(blocks, settings.dense_router_gradient, score, gater)
    model, optimizer = accelerator.prepare(model, make_optimizer(settings, training))
    model.train()
    if settings.tracker is not None:
        accelerator.init_trackers("upcycle", config=settings.settings())
    workspace = partial_folder(job.out)
    setup = Setup(
        settings=settings,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        teacher=teacher,
        blocks=blocks,
        scales=scales,
        tap=tap,
        activations=activations,
        gater=gater,
        router_terms=terms,
        train=train_data,
        validation=validation,
        folder=workspace / ASIDE,
        log_file=workspace / TRAIN_LOG,
        watch=watch.row,
        say_budget=watch.budget,
    )
    return setup, summary(known, training)


def _facts(job: Job, train_data: Data, accelerator: Accelerator) -> Facts:
    """What plug-ins may ask, found without the weights: what can't work is refused before a teacher
    has read a text, which may take hours.

    Raises:
        UpcycleError: the model has no experts, or a setting has no effect on it.
    """
    config = read_config(job.folder)
    layers = config.get_text_config().num_hidden_layers
    check_layers(layers, len(read_headers(job.folder)), job.folder)
    blocks = moe_blocks(skeleton(config))
    _check_blocks(job, blocks, config.model_type)
    facts = facts_of(config, job.record, blocks, train_data, accelerator)
    check_plugins(job.settings, facts)
    return facts


def _check_blocks(job: Job, blocks: list[MoEBlock], model_type: str) -> None:
    settings = job.settings
    if not blocks and settings.activation is None:
        raise UpcycleError(
            f"{job.label} has no experts: it is dense, so `upcycle convert` it first"
        )
    if settings.balance_bias and any(b.selection_bias is None for b in blocks):
        raise UpcycleError(
            f"{setting('balance_bias', settings.balance_bias)} has no effect on {model_type}, "
            "which has no selection bias: use `balance`"
        )


def _data(job: Job) -> tuple[Data, Data]:
    settings, vocab_size = job.settings, read_text_config(job.folder).vocab_size
    train_data, held = training_data(
        job.folder,
        vocab_size,
        settings.data,
        seq_len=settings.seq_len,
        train_tokens=settings.total_steps * settings.step_tokens,
        validation_tokens=settings.held_tokens,
        seed=settings.seed,
        assistant_only=settings.assistant_only_loss,
    )
    if settings.validate_also is not None:
        held = with_texts(
            held,
            job.folder,
            vocab_size,
            settings.validate_also,
            seq_len=settings.seq_len,
            tokens=settings.held_tokens,
            seed=settings.seed,
        )
    return train_data, held


def _dtype(job: Job) -> torch.dtype:
    """Steps of training are too small for weights below float32; frozen weights may be."""
    if job.settings.dtype != "auto":
        return torch_dtype(job.settings.dtype)
    if job.settings.lora:
        return next(iter(read_headers(job.folder).values())).dtype
    return torch.float32


def _teacher(
    job: Job,
    accelerator: Accelerator,
    train_data: Data,
    validation: Data,
    watch: Watch,
    steps: int | None,
) -> Teacher | None:
    """The teacher, if it runs in every step, and its predictions for what is read again and again,
    made if an earlier start of this run has not left them.

    Args:
        steps: for which alone those of what is trained on are needed; None for all.
    """
    if job.teacher is None:
        return None
    settings, folder = job.settings, partial_folder(job.out) / ASIDE
    train_words, held_words = stored_words(job)
    train = folder / "teacher-train.bin", train_data, train_words
    held = folder / "teacher-validation.bin", validation, held_words
    wanted: list[tuple[tuple[Path, Data, int], float, list[int]]] = []
    if train_words:
        rows = _rows(settings, len(train_data), steps)
        wanted.append((train, settings.distill_temperature, rows))
    wanted.append((held, 1.0, list(range(len(validation)))))
    missing = [each for each in wanted if not is_stored(*each[0])]
    model = _load_teacher(job, accelerator) if missing or not train_words else None
    number, world = accelerator.process_index, accelerator.num_processes
    processes = number, world, accelerator.wait_for_everyone
    if steps is not None:  # a rehearsal's processes have folders of their own
        processes = 0, 1, lambda: None
    start = time.monotonic()
    for (path, data, words), temperature, rows in missing:
        run = partial(_logits, model, accelerator)
        fill(path, data, run, words, temperature, processes, watch.teacher, rows)
    read = sum(len(rows) for *_, rows in missing) * (world // processes[1])
    return Teacher(
        held=open_store(*held),
        train=open_store(*train) if train_words else None,
        model=None if train_words else model,
        seconds=(time.monotonic() - start) / max(1, read),
    )


def _rows(settings: Training, sequences: int, steps: int | None) -> list[int]:
    """The sequences that the first steps train on, or all of them."""
    if steps is None:
        return list(range(sequences))
    batch_size, seed = settings.batch_size, settings.seed
    seen = [batch_rows(sequences, batch_size, step, seed) for step in range(steps)]
    rows: list[int] = torch.cat(seen).unique().tolist()
    return rows


def _logits(model: Any, accelerator: Accelerator, tokens_BL: Tensor) -> Tensor:
    with accelerator.autocast():
        tokens_BL = tokens_BL.to(accelerator.device)
        logits_BLV: Tensor = model(input_ids=tokens_BL, use_cache=False).logits
    return logits_BLV


def _load_teacher(job: Job, accelerator: Accelerator) -> nn.Module:
    assert job.teacher is not None
    dtype = torch.float32 if accelerator.device.type == "cpu" else torch.bfloat16
    model: nn.Module = load_model(job.teacher, dtype, accelerator.device)
    return model.requires_grad_(False)
