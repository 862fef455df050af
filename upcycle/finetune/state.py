"""The state of a training run on disk: enough to go on bit by bit, without a pickle.

Where processes hold shards of the tensors (FSDP), whole tensors are written, so every process must
take part in saving.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from upcycle.core.foreign import blaming
from upcycle.core.json_text import json_text
from upcycle.core.paths import whole_file
from upcycle.models.blocks import SELECTION_BIAS

STATE = "state.safetensors"


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that a step may change, by name: the parameters that train, and buffers."""
    return {name: _whole(tensor).clone() for name, tensor in _changing(model)}


@torch.no_grad()
def put_back(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """What `trained_tensors` gave."""
    for module in model.modules():
        # What a forward pass has gathered of the shards would outlive their new values.
        if isinstance(module, FSDPModule):
            module.reshard()
    for name, tensor in _changing(model):
        tensor.copy_(_like(tensors[name], tensor))


def _changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    yield from ((name, b) for name, b in model.named_buffers() if name.endswith(SELECTION_BIAS))


def whole_model(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model, on the CPU."""
    return {name: _whole(tensor) for name, tensor in model.state_dict().items()}


def save_state(
    folder: Path, model: nn.Module, optimizer: Any, notes: dict[str, Any], *, write: bool
) -> None:
    """Write the model, the optimizer and the notes, in place of a former state in one step.

    Args:
        write: whether this process is the one that does.
    """
    tensors = {f"model.{name}": t for name, t in trained_tensors(model).items()}
    for number, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{number}.{key}"] = _whole(value)
    if write:
        save_tensors(folder / STATE, tensors, notes)


def save_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """One file, whole or as it was before."""
    with whole_file(path) as draft:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            draft,
            metadata={"notes": json_text(notes)},
        )


def load_state(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Put the saved model and optimizer state back."""
    with blaming(f"{folder / STATE} is damaged, so drop `resume` to start anew"):
        tensors = load_file(folder / STATE, backend="pread")
    put_back(model, _under(tensors, "model."))
    for number, parameter in enumerate(_parameters(optimizer)):
        saved = _under(tensors, f"optimizer.{number}.")
        optimizer.state[parameter] = {
            # The count of steps is a number on the CPU.
            key: _like(value, parameter) if value.dim() else value
            for key, value in saved.items()
        }


def read_notes(folder: Path) -> dict[str, Any] | None:
    """The notes of the saved state, if there is one."""
    if not (folder / STATE).is_file():
        return None
    with (
        blaming(f"{folder / STATE} is damaged, so drop `resume` to start anew"),
        safe_open(folder / STATE, framework="pt") as file,
    ):
        notes: dict[str, Any] = json.loads(file.metadata()["notes"])
    return notes


def torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _parameters(optimizer: Any) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _whole(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu()


def _like(whole: Tensor, tensor: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds of `tensor`."""
    whole = whole.to(tensor.device)
    if isinstance(tensor, DTensor):
        return distribute_tensor(whole, tensor.device_mesh, tensor.placements)
    return whole
