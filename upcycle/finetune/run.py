"""`upcycle finetune`: from a checkpoint and a text to a checkpoint that is whole or absent."""

import errno
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from upcycle.core.errors import Diverged, UpcycleError
from upcycle.core.flags import setting
from upcycle.core.machine import torch_threads
from upcycle.core.paths import local_path
from upcycle.finetune.activations import swap
from upcycle.finetune.budget import Budget, Proposal
from upcycle.finetune.data import Data, batch_rows, training_data, with_texts
from upcycle.finetune.job import Job, job_identity, open_job
from upcycle.finetune.loop import make_optimizer, restore_best, settle, train
from upcycle.finetune.partition import add_affinities
from upcycle.finetune.plugins import facts_of, gater_for, router_terms
from upcycle.finetune.processes import accelerator_for
from upcycle.finetune.publish import Finetuning, publish
from upcycle.finetune.rehearsal import STEPS, propose
from upcycle.finetune.routers import RouterTap, keep_float32, measure_scales
from upcycle.finetune.settings import Training
from upcycle.finetune.state import read_notes, torch_dtype
from upcycle.finetune.step import Progress, Row, Setup, score_of
from upcycle.finetune.teacher import HELD_WORDS, Teacher, fill, is_stored, open_store
from upcycle.finetune.teacher import size as stored_size
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
from upcycle.models.config import read_text_config
from upcycle.models.loading import load_model
from upcycle.models.record import TRAIN_LOG, Identity, Used
from upcycle.models.shards import read_headers
from upcycle.models.writer import (
    ASIDE,
    Workspace,
    begun_run,
    check_out,
    check_unfinished,
    partial_folder,
    recorded_run,
)

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
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


def finetune(
    model: str,
    out: str | Path,
    *,
    preset: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    watch: Watch | None = None,
    **settings: Any,
) -> Finetuning:
    """Train a Mixture-of-Experts further, or with `relufy` a dense model before it becomes one,
    alone or as one of the processes of `torchrun`.

    Args:
        model: a folder or hub id, such as what `convert` wrote.
        out: the folder for the result: a checkpoint of the same layout, or with `lora` and
            without `merge` an adapter.
        preset: `heal`, `specialise`, `routers`, `btx`, `lora`, `relufy` or another that
            `upcycle recipes` lists, or a YAML file; by default `heal` for a split, `specialise`
            for copies and merges.
        overwrite: replace a former result.
        resume: go on from the saved state of a run that was stopped. The result has the same
            bytes as that of an uninterrupted run, on a CPU.
        settings: fields of `Training` to replace.

    Raises:
        AlreadyFinished: the run to resume has left its result.
        UpcycleError: the request or its input is wrong.
        Diverged: a loss or a gradient was no number; `out` holds the best state before, if
            that was kept.
        CheckFailed: what was written is not what was trained.
        KeyboardInterrupt: stopped; the state is kept beside `out`.
    """
    with ExitStack() as stack:
        job = open_job(model, local_path(out).resolve(), preset, settings, stack)
        check_out(job.out, job.folder, _room(job), overwrite=overwrite, resume=resume)
        accelerator = stack.enter_context(accelerator_for(job.settings))
        identity = _identity(job, accelerator.num_processes, overwrite=overwrite, resume=resume)
        stack.enter_context(torch_threads(identity.threads))
        stack.enter_context(
            _workspace(job, identity, accelerator, overwrite=overwrite, resume=resume)
        )
        watch = watch if watch is not None and accelerator.is_main_process else Watch()
        setup, groups = _prepare(job, accelerator, watch)
        progress = Progress()
        if job_identity(job, accelerator.num_processes, identity.threads) != identity:
            raise UpcycleError(
                f"{job.label} or its text changed while it was read: leave it as it is, and start "
                "anew"
            )
        watch.begin(setup.settings, groups, setup.train.used)
        stopped = _train(setup, progress)
        restore_best(setup, progress)
        settle(setup, progress)
        done = publish(setup, progress, groups, job)
    if stopped is not None:
        raise Diverged(
            f"{stopped}; {job.out} holds the state after step {done.result_step}, the best before"
        )
    return done


def rehearse(
    model: str, *, preset: str | Path | None = None, watch: Watch | None = None, **settings: Any
) -> Proposal:
    """What `finetune` with these arguments would train, how long it would take here, and what it
    may bring; nothing is written.

    Raises:
        UpcycleError: as `finetune`.
        Diverged: a loss or a gradient is no number.
    """
    with ExitStack() as stack:
        # What the teacher predicts is kept for as long as this takes.
        out = Path(stack.enter_context(TemporaryDirectory())) / "rehearsal"
        job = open_job(model, out, preset, settings | {"tracker": None}, stack)
        (partial_folder(out) / ASIDE).mkdir(parents=True)
        accelerator = stack.enter_context(accelerator_for(job.settings))
        watch = watch if watch is not None and accelerator.is_main_process else Watch()
        setup, groups = _prepare(job, accelerator, watch, steps=STEPS)
        watch.begin(setup.settings, groups, setup.train.used)
        return propose(setup)


def _train(setup: Setup, progress: Progress) -> Diverged | None:
    """All steps; what they came to grief on, where there is a better state to go back to.

    Raises:
        Diverged: there is none.
    """
    try:
        with _stopping(progress):
            train(setup, progress)
    except Diverged as error:
        if setup.settings.keep_best and progress.log:
            return error
        raise
    return None


def _identity(job: Job, processes: int, *, overwrite: bool, resume: bool) -> Identity:
    """What the run is known by; if it is resumed, with its threads of before.

    Raises:
        AlreadyFinished: it has left its result.
        UpcycleError: there is another result, which is not to be overwritten.
    """
    begun = None
    if resume:
        made = recorded_run(job.out)
        known = job_identity(job, processes, made.threads if made else 1)
        check_unfinished(job.out, known, overwrite=overwrite)
        begun = begun_run(job.out)
    return job_identity(job, processes, begun.threads if begun else torch.get_num_threads())


def _room(job: Job) -> int:
    """Bytes that a run writes: in float32 weights, two moments, the best weights, the result; and
    what it keeps of the teacher's predictions."""
    sizes = [torch.Size(info.shape).numel() for info in read_headers(job.folder).values()]
    settings = job.settings
    kept = 0
    if job.teacher is not None:
        train, held = _stored_words(job)
        kept = stored_size(settings.total_steps * settings.step_tokens, train) if train else 0
        kept += stored_size(settings.held_tokens, held)
    return 5 * 4 * sum(sizes) + kept


def _stored_words(job: Job) -> tuple[int, int]:
    """Of the teacher's predictions, per token that is trained on, 0 if it runs in every step, and
    per token that is validated on."""
    vocab_size = int(read_text_config(job.folder).vocab_size)
    return min(job.settings.teacher_top_k, vocab_size), min(HELD_WORDS, vocab_size)


@contextmanager
def _workspace(
    job: Job, identity: Identity, accelerator: Accelerator, *, overwrite: bool, resume: bool
) -> Iterator[None]:
    """The folder beside `out`, made and published by the first process. A state that has been
    saved there stays until the result is published, whatever happens.

    Raises:
        UpcycleError: there is no room.
    """
    workspace = None
    if accelerator.is_main_process:
        workspace = Workspace(job.out, identity, resume=resume)
        (workspace.folder / ASIDE).mkdir(exist_ok=True)
        # A run that was killed while it wrote its result may have left a part of one.
        shutil.rmtree(workspace.result)
        workspace.result.mkdir()
    accelerator.wait_for_everyone()
    try:
        yield
        if workspace is not None:
            workspace.publish(overwrite=overwrite)
    except BaseException as error:
        if workspace is not None:
            saved = read_notes(workspace.folder / ASIDE)
            workspace.resume |= saved is not None or isinstance(error, KeyboardInterrupt)
            workspace.abandon()
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise _no_room(job.out, error, saved) from error
        raise


def _no_room(out: Path, error: OSError, saved: dict[str, Any] | None) -> UpcycleError:
    """What to do about a full disk, by the notes of the state that was saved before."""
    after = "start anew" if saved is None else f"`resume` goes on from step {saved['step']}"
    return UpcycleError(f"can't write beside {out}: {error.strerror}; make room, then {after}")


def _prepare(
    job: Job, accelerator: Accelerator, watch: Watch, steps: int | None = None
) -> tuple[Setup, Groups]:
    """Model, data, optimizer: all that the loop needs, for all steps or the first ones."""
    settings, folder = job.settings, job.folder
    train_data, validation = _data(job)
    teacher = _teacher(job, accelerator, train_data, validation, watch, steps)
    model = load_model(folder, _dtype(job), accelerator.device)
    blocks = moe_blocks(model)
    _check_blocks(job, blocks, model.config.model_type)
    activations = settings.activation and swap(model, settings.activation, validation)
    keep_float32(blocks)
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
    facts = facts_of(model.config, blocks, train_data, accelerator)
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
    train_words, held_words = _stored_words(job)
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


@contextmanager
def _stopping(progress: Progress) -> Iterator[None]:
    """Ctrl-C, or a scheduler's SIGTERM, lets the step end and the state be saved; a second one
    stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if progress.stop:
            raise KeyboardInterrupt
        progress.stop = True

    former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
