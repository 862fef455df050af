"""The models of an evaluation, and how they are read."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from upcycle.core.errors import UpcycleError
from upcycle.models.adapter import adapter_base
from upcycle.models.config import read_text_config
from upcycle.models.loading import kind_of
from upcycle.models.opening import checkpoint_folder

DTYPES = ("float32", "bfloat16", "float16")
BUILTIN_SEED = 1
"""Another order of the builtin text than the one that conversions calibrate on."""


@contextmanager
def base_folder(folder: Path) -> Iterator[Path]:
    """The folder itself, or of a low-rank adapter, that of the model that it changes."""
    base = adapter_base(folder)
    if base is None:
        yield folder
        return
    with checkpoint_folder(base) as found:
        yield found


def shared_vocab_size(folder: Path, dense_folder: Path | None) -> int:
    """Of a model, and of the one that it is compared with.

    Raises:
        UpcycleError: they differ, or one predicts what the other does not.
    """
    vocab_size = int(read_text_config(folder).vocab_size)
    if dense_folder is not None:
        own, reference = kind_of(folder), kind_of(dense_folder)
        if own != reference:
            raise UpcycleError(
                f"`against={dense_folder}` is {reference}, but {folder} is {own}: give the dense "
                "model that it was made from"
            )
        other = int(read_text_config(dense_folder).vocab_size)
        if other != vocab_size:
            raise UpcycleError(
                f"`against={dense_folder}` has a vocabulary of {other:,} tokens, but {folder} one "
                f"of {vocab_size:,}: give the dense model that it was made from"
            )
    return vocab_size


def choose_dtype(name: str, folder: Path, device: torch.device) -> torch.dtype:
    """The dtype that `--dtype` names; `auto` is float32 on a CPU, elsewhere the checkpoint's."""
    if name == "auto":
        own = read_text_config(folder).dtype
        return torch.float32 if device.type == "cpu" or own is None else own
    if name not in DTYPES:
        raise UpcycleError(f"`dtype={name!r}` is unknown: give auto, {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def merged(model: Any, adapter: Path) -> Any:
    """The model with a low-rank adapter added to its weights.

    Raises:
        UpcycleError: peft is missing, or the adapter does not fit the model.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UpcycleError(f"{adapter} is an adapter: `pip install upcycle[lora]`") from error
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UpcycleError(f"{adapter} holds no adapter_model.safetensors, so it is not whole")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return (
                PeftModel.from_pretrained(model, adapter, use_safetensors=True)
                .merge_and_unload()
                .eval()
            )
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError, UserWarning) as error:
        reason = str(error).splitlines()[0]
        raise UpcycleError(f"{adapter} does not fit the model that it names: {reason}") from error
