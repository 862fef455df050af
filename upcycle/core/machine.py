"""Where to compute, as people name it."""

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from upcycle.core.errors import UpcycleError


def choose_device(name: str) -> torch.device:
    """The device that `--device` names; `auto` is a GPU where there is one.

    Raises:
        UpcycleError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UpcycleError(f"`device={name!r}` is not a device: give auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UpcycleError(f"`device={name!r}` is not supported: give auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UpcycleError(
            f"`device={name}`: torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device now."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0])


def total_memory(device: torch.device) -> int:
    """Bytes that the device has."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().total)
    return int(torch.cuda.mem_get_info(device)[1])


def peak_memory() -> int:
    """Peak resident bytes of this process so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # psutil knows no peak elsewhere, and Windows has no such module.

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """What its maker calls the GPU or the CPU, where the system says so."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within it, torch computes with so many threads: how sums are dealt out among them shows in
    their last bits."""
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)
