"""A model's folder, which MODEL names by its path or by a hub id."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from upcycle.core.errors import UpcycleError
from upcycle.core.paths import check_model, check_name, local_path
from upcycle.models.config import read_config
from upcycle.models.download import Remote, download, remote_weights
from upcycle.models.shards import TensorInfo, read_headers, weight_files


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder."""

    folder: Path
    remote: Remote | None = None
    """Its weights, if they are not in the folder yet."""

    def headers(self) -> dict[str, TensorInfo]:
        """As `read_headers`."""
        return read_headers(self.folder, self.remote.parts if self.remote else None)


def locate(
    model: str,
    revision: str | None,
    *,
    accept: Callable[[PreTrainedConfig], Any] = lambda config: None,
) -> Checkpoint | None:
    """What MODEL names, of a hub id without the weights that are not in the hub's cache; None for a
    GGUF file.

    `accept` may raise on the config of a hub id before anything else is fetched.
    """
    check_model(model, revision)
    path = local_path(model)
    check_name(path)
    if path.is_dir():
        return Checkpoint(path)
    if path.is_file():
        return None
    folder = download(model, revision, lambda folder: accept(read_config(folder)))
    return Checkpoint(
        folder, None if _weights_are_here(folder) else remote_weights(model, folder.name)
    )


def _weights_are_here(folder: Path) -> bool:
    try:
        return bool(weight_files(folder))
    except UpcycleError:
        return False
