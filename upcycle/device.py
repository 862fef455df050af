"""Where to compute, as people name it."""

import psutil
import torch

from upcycle.errors import UpcycleError


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
        raise UpcycleError(f"--device {name!r} is not a device: give auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UpcycleError(f"--device {name!r} is not supported: give auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UpcycleError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device now."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0])
