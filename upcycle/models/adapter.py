"""Low-rank adapters: how the folder of one finds the model that it changes."""

import json
from pathlib import Path

from upcycle.core.errors import UpcycleError

CONFIG = "adapter_config.json"


def adapter_base(folder: Path) -> str | None:
    """The model that the adapter in a folder changes, as a path or a hub id; None if the folder
    holds a model of its own.

    Raises:
        UpcycleError: the adapter does not say, or its model is not where it says.
    """
    path = folder / CONFIG
    if not path.is_file() or (folder / "config.json").is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise UpcycleError(f"{path} names no model: restore base_model_name_or_path") from error
    if not isinstance(base, str) or not base:
        raise UpcycleError(f"{path} names no model: restore base_model_name_or_path")
    beside = folder.resolve() / base
    if base.startswith("..") and not beside.is_dir():
        raise UpcycleError(
            f"{path} names {base}, which is not there: put the model at {beside.resolve()}"
        )
    return str(beside.resolve()) if beside.is_dir() else base
