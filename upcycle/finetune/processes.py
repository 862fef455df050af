"""The processes that train together: how many their launcher has started, and on which devices."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.finetune.settings import Training


@contextmanager
def accelerator_for(request: Training) -> Iterator[Accelerator]:
    """What this process trains by, alone or as one of several.

    Raises:
        UpcycleError: the devices or the processes are not those that were asked for, or the
            request does not suit them.
    """
    # Said again below, as an error.
    warnings.filterwarnings("ignore", message=".*no supported trackers")
    on_cpu = _on_cpu(request)
    try:
        accelerator = Accelerator(
            mixed_precision=request.precision,
            # Without being told, accelerate joins processes on GPUs only.
            cpu=True if on_cpu else None,
            log_with=request.tracker,
            project_dir=".",
        )
    except (ValueError, ImportError) as error:
        AcceleratorState._reset_state()
        reason = " ".join(str(error).split())
        raise UpcycleError(f"accelerate can't start: {reason}") from error
    try:
        _check_started(accelerator)
        _check_request(accelerator, request)
        if accelerator.distributed_type == DistributedType.FSDP:
            _shard_in_float32(accelerator, request)
        yield accelerator
    finally:
        accelerator.end_training()
        AcceleratorState._reset_state()  # else the next run in this process gets our precision


def _on_cpu(request: Training) -> bool:
    if request.device == "cpu" or (
        request.device == "auto" and not torch.accelerator.is_available()
    ):
        return True
    processes, devices = (
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        torch.accelerator.device_count(),
    )
    if 0 < devices < processes:
        raise UpcycleError(
            f"{processes} processes were started, but torch sees {devices} GPUs here: start at "
            f"most {devices}, or pass `device=cpu`"
        )
    return False


def _check_started(accelerator: Accelerator) -> None:
    """Without several GPUs `accelerate launch --num_processes 2` starts one process and says
    nothing; that more were asked for shows by the address at which they would have met."""
    launched = {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys()
    if launched and accelerator.num_processes == 1:
        raise UpcycleError(
            "accelerate was asked for several processes but has started one, as it does where "
            "there are not several GPUs: start them by `torchrun --nproc_per_node N -m upcycle "
            "finetune … --device cpu`, or pass --num_processes 1"
        )


def _check_request(accelerator: Accelerator, request: Training) -> None:
    if request.tracker is not None and not accelerator.log_with:
        raise UpcycleError(
            f"{setting('tracker', request.tracker)} is not installed: pip install {request.tracker}"
        )
    if request.device == "cuda" and accelerator.device.type != "cuda":
        raise UpcycleError("`device=cuda`: torch sees no CUDA device here")
    each = request.micro_batch * accelerator.num_processes
    if request.batch_size % each:
        raise UpcycleError(
            f"`batch_size={request.batch_size}` is not a multiple of {each}, which is "
            f"{setting('micro_batch', request.micro_batch)} on {accelerator.num_processes} "
            f"processes: give `batch_size={-(-request.batch_size // each) * each}`"
        )


def _shard_in_float32(accelerator: Accelerator, request: Training) -> None:
    """Let FSDP gather weights as they are, so that routers stay in float32; autocast rounds the
    others where they are used, as without FSDP."""
    if request.dtype not in ("auto", "float32") and not request.lora:
        raise UpcycleError(
            f"{setting('dtype', request.dtype)} with FSDP, which shards weights of one dtype, "
            "while routers stay in float32: use `precision`"
        )
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
