"""How llama.cpp's converter stores a family: under which keys, names and values."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.core.registry import Registry
from upcycle.models.gguf.fields import Fields
from upcycle.models.gguf.file import GgufFile
from upcycle.models.gguf.metadata import Metadata
from upcycle.models.gguf.restored import as_they_are


def one(name: str) -> tuple[str, ...]:
    return (name,)


@dataclass(frozen=True)
class Stored:
    """A family in GGUF files."""

    model_type: str
    """What transformers calls it."""
    fields: Callable[[GgufFile, Metadata], Fields]
    """The config's. What it takes from the metadata is understood."""
    spelled: Callable[[str], tuple[str, ...]] = one
    """What the converter calls a tensor, or those that it cuts its rows into, before it looks the
    name up in the gguf package's table."""
    restored: Callable[[str, Tensor, PreTrainedConfig], Tensor] = as_they_are
    """A tensor's values as transformers has them, from those of the name in the file."""
    beside: Callable[[PreTrainedConfig], dict[str, str]] = lambda config: {}
    """Tensors that transformers passes over, by their names in the file; they may be there."""


STORED: Registry[Stored] = Registry("GGUF architecture")
"""By the architecture that the files name."""


def with_time_step(name: str) -> tuple[str, ...]:
    """The spelling of Mamba's layers."""
    return (re.sub(r"\.dt_bias$", ".dt_proj.bias", name),)
