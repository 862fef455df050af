"""What text a model was fitted on, as its record says."""

from pathlib import Path

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import read_json
from upcycle.core.paths import public_name
from upcycle.models.record.file import OURS, RECORD, Made, Record, record_of
from upcycle.models.text import weighted


def fitted_on(folder: Path) -> set[str]:
    """The texts that a model was calibrated or trained on, by `identity`; none if unknown.

    Raises:
        UpcycleError: the record is not JSON.
    """
    path = folder / RECORD
    if not path.is_file():
        return set()
    fields = read_json(path, OURS)
    try:
        named = _texts(record_of(fields, path))
    except UpcycleError:
        return set()  # damaged, which is said by the commands that need it
    return {identity(text) for joined in named for text, _ in weighted(joined)}


def _texts(record: Record) -> list[str]:
    named = [run.settings.data for run in record.training]
    if isinstance(record, Made):
        named += record.router_texts
        if record.plan.calibration_tokens:
            named.append(record.plan.recipe.calibration)
    return named


def identity(text: str) -> str:
    """What the record calls a text: a file by its name alone."""
    return public_name(text)
