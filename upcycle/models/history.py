"""What text a model was fitted on, as the upcycle.json beside its weights says."""

from pathlib import Path

from upcycle.core.foreign import read_json
from upcycle.core.paths import public_name
from upcycle.models.text import texts


def fitted_on(folder: Path) -> set[str]:
    """The texts that a model was calibrated or trained on, by `identity`; none if unknown.

    Raises:
        UpcycleError: the record is not JSON.
    """
    path = folder / "upcycle.json"
    if not path.is_file():
        return set()
    record = read_json(path, "what upcycle writes")
    try:
        named = [run["settings"]["data"] for run in record.get("training", [])]
        if record.get("plan", {}).get("calibration_tokens"):
            named.append(record["plan"]["recipe"]["calibration"])
        return {identity(text) for joined in named for text in texts(joined)}
    except (KeyError, TypeError, AttributeError):
        return set()  # damaged, which is said by the commands that need it


def identity(text: str) -> str:
    """What the record calls a text: a file by its name alone."""
    return public_name(text)
