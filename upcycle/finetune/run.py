"""`upcycle finetune`: from a checkpoint and a text to a checkpoint that is whole or absent."""

import errno
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator

from upcycle.core.errors import Diverged, UpcycleError
from upcycle.core.machine import torch_threads
from upcycle.core.paths import local_path
from upcycle.finetune.budget import Proposal
from upcycle.finetune.finished import Finetuning
from upcycle.finetune.job import Job, job_identity, open_job
from upcycle.finetune.loop import restore_best, settle, train
from upcycle.finetune.preparing import Watch, prepare, stored_words
from upcycle.finetune.processes import accelerator_for
from upcycle.finetune.publish import publish
from upcycle.finetune.rehearsal import STEPS, propose
from upcycle.finetune.setup import Progress, Setup
from upcycle.finetune.state import read_notes
from upcycle.finetune.teacher import size as stored_size
from upcycle.models.record.file import Identity
from upcycle.models.shards import read_headers
from upcycle.models.text import text_files
from upcycle.models.workspace import (
    ASIDE,
    Workspace,
    begun_run,
    check_out,
    check_unfinished,
    partial_folder,
    recorded_run,
)

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
        may = {"overwrite": overwrite, "resume": resume}
        check_out(job.out, job.folder, _room(job), beside=_read_beside(job), **may)
        accelerator = stack.enter_context(accelerator_for(job.settings))
        identity = _identity(job, accelerator.num_processes, overwrite=overwrite, resume=resume)
        stack.enter_context(torch_threads(identity.threads))
        stack.enter_context(
            _workspace(job, identity, accelerator, overwrite=overwrite, resume=resume)
        )
        watch = watch if watch is not None and accelerator.is_main_process else Watch()
        setup, groups = prepare(job, accelerator, watch)
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
        setup, groups = prepare(job, accelerator, watch, steps=STEPS)
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


def _read_beside(job: Job) -> list[Path]:
    """Files and folders that a run reads besides the model."""
    settings = job.settings
    files = [*text_files(settings.data), *text_files(settings.validate_also or "builtin")]
    return files if job.teacher is None else [job.teacher, *files]


def _room(job: Job) -> int:
    """Bytes that a run writes: in float32 weights, two moments, the best weights, the result; and
    what it keeps of the teacher's predictions."""
    sizes = [torch.Size(info.shape).numel() for info in read_headers(job.folder).values()]
    settings = job.settings
    kept = 0
    if job.teacher is not None:
        train, held = stored_words(job)
        kept = stored_size(settings.total_steps * settings.step_tokens, train) if train else 0
        kept += stored_size(settings.held_tokens, held)
    return 5 * 4 * sum(sizes) + kept


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
