"""What text a model was fitted on, as the upcycle.json beside its weights says."""

import json
from pathlib import Path

from upcycle.paths import local_path
from upcycle.text import OURS, texts


def fitted_on(folder: Path) -> set[str]:
    """The texts that a model was calibrated or trained on, by `identity`; none if unknown."""
    path = folder / "upcycle.json"
    if not path.is_file():
        return set()
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        named = [run["settings"]["data"] for run in record.get("training", [])]
        if record.get("plan", {}).get("calibration_tokens"):
            named.append(record["plan"]["recipe"]["calibration"])
        return {identity(text) for joined in named for text in texts(joined)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()  # damaged, which is said by the commands that need it


def identity(text: str) -> str:
    """The same for all names of a text: for a file or folder, its whole path."""
    path = local_path(text)
    return str(path.resolve()) if path.is_file() or (path.is_dir() and text not in OURS) else text
