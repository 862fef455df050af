"""What a training run leaves: the checkpoint, checked by reading it again, and its history."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle.core.errors import CheckFailed
from upcycle.evaluation.comparing import next_token_logits
from upcycle.evaluation.result import TOLERANCE, relative_error
from upcycle.finetune.finished import Finetuning
from upcycle.finetune.history import write_history
from upcycle.finetune.job import Job
from upcycle.finetune.settings import Training
from upcycle.finetune.setup import Progress, Setup
from upcycle.finetune.state import whole_model
from upcycle.finetune.trainable import Groups
from upcycle.finetune.writing import check_tensors, with_adapter, write_adapter, write_model
from upcycle.models.record.file import DOMAINS
from upcycle.models.record.training import Zeros
from upcycle.models.shards import read_headers
from upcycle.models.workspace import result_folder

CHECK_TOKENS = 256


def publish(setup: Setup, progress: Progress, groups: Groups, job: Job) -> Finetuning:
    """Write the result into the workspace of the job's folder. Every process must call it.

    Raises:
        CheckFailed: what was written is not what was trained.
    """
    settings, folder = setup.settings, job.folder
    plain = setup.plain.eval()
    window_L = setup.validation.tokens_BL[0, :CHECK_TOKENS]
    expected_LV = next_token_logits(plain, window_L).cpu()
    tensors = whole_model(plain)
    done = Finetuning(
        model=job.label,
        out=job.out,
        settings=settings,
        groups=groups,
        used=setup.train.used,
        log=progress.log,
        result_step=progress.best_step if settings.keep_best else progress.step,
        tokens=progress.step * settings.step_tokens,
        seconds=progress.seconds,
        processes=setup.accelerator.num_processes,
        zeros=_zeros(setup, plain),
    )
    if not setup.accelerator.is_main_process:
        return done
    if settings.train == "experts" and (folder / DOMAINS).is_file():
        # It makes the rows that there are no longer, once routers have trained.
        shutil.copyfile(folder / DOMAINS, result_folder(job.out) / DOMAINS)
    place = result_folder(job.out)
    stored = next(iter(read_headers(folder).values())).dtype
    written = _write(plain, tensors, stored, settings, job, place)
    error = relative_error(next_token_logits(written, window_L), expected_LV)
    # Below float32, rounding may send a token to other experts; its tensors have been compared.
    exact = setup.accelerator.mixed_precision == "no" and plain.dtype == stored == torch.float32
    if exact and not error <= TOLERANCE:
        raise CheckFailed(
            f"the written checkpoint is not the model that was trained: its logits differ by "
            f"{error:.2g} of their spread (at most {TOLERANCE:g} is rounding)"
        )
    done = replace(done, reload_error=error)
    write_history(done, job, place)
    return done


def _write(
    plain: Any,
    tensors: dict[str, Tensor],
    stored: torch.dtype,
    settings: Training,
    job: Job,
    place: Path,
) -> Any:
    """Write what was trained; returns the model that the files hold, read again."""
    if not settings.lora:
        return write_model(plain, tensors, stored, job.folder, place, settings.activation)
    write_adapter(plain, tensors, job, place)
    written = with_adapter(job.folder, place)
    # The rest, perhaps in another dtype while it trained, is the model's own.
    check_tensors(written, {name: t for name, t in tensors.items() if ".lora_" in name})
    if settings.merge:
        for path in place.glob("adapter_*"):
            path.unlink()
        written = write_model(written.merge_and_unload(), None, stored, job.folder, place)
    return written


def _zeros(setup: Setup, plain: Any) -> Zeros | None:
    tap = setup.activations
    if tap is None:
        return None
    return Zeros(
        original=tap.zeros_of_original,
        before=tap.zeros_before,
        after=tap.zeros(plain, setup.validation),
    )
