"""What the report page shows of a model, read from its folder and from saved evaluations.

All files are read as what they were written from, so one that is not what it should be is an error
with its name and field, never half a page.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import first_problem, read_json
from upcycle.core.paths import public_name
from upcycle.core.progress import Progress
from upcycle.evaluation.inspection import inspect_found
from upcycle.evaluation.measured import Evaluation
from upcycle.evaluation.run import evaluate
from upcycle.evaluation.sample import Sample, samples
from upcycle.models.checkpoint import locate
from upcycle.models.config import read_config
from upcycle.models.families import auto_class
from upcycle.models.loading import check_decoder
from upcycle.models.record.file import RECORD, Made, read_record
from upcycle.models.train_log import TRAIN_LOG, LogLine, read_log

Read = TypeVar("Read")


class Inspection(BaseModel):
    """What `upcycle inspect` says; a dense model has no experts."""

    kind: str
    architecture: str
    experts: int = 0
    top_k: int = 0
    expert_size: int = 0
    params_total: int = 0

    @property
    def dense(self) -> bool:
        return self.kind == "dense"


@dataclass(frozen=True)
class Facts:
    """What the page shows of a model, but what is measured."""

    model: str
    inspection: Inspection
    made: Made | None
    """How upcycle made it, if it did."""
    log: list[LogLine]
    loader: str = "AutoModelForCausalLM"
    """The class of transformers that loads it by its folder."""


@dataclass(frozen=True)
class Measured:
    """What the page shows that takes running the model."""

    evaluation: Evaluation
    samples: list[Sample]


def gather(model: str) -> Facts:
    """The facts that lie in the model's folder.

    Raises:
        UpcycleError: it is no model, an encoder, or a file beside its weights is not what upcycle
            writes.
    """
    found = locate(model, None)
    folder = found.folder if found else None
    record, log = None, []
    if folder is not None:
        check_decoder(model, folder)
    if folder is not None and (folder / RECORD).is_file():
        record = read_record(folder / RECORD)
    if folder is not None and (folder / TRAIN_LOG).is_file():
        log = read_log(folder / TRAIN_LOG)
    inspection = Inspection.model_validate(inspect_found(model, found))
    made = record if isinstance(record, Made) else None
    if folder is None:
        return Facts(model, inspection, made, log)
    return Facts(model, inspection, made, log, auto_class(read_config(folder)).__name__)


def read_evaluation(path: Path, found: Facts) -> Measured:
    """A saved `upcycle eval --json` of the model that `gather` found this of, and the `samples`
    that it may hold.

    Raises:
        UpcycleError: it is missing, something else, or of another model.
    """
    if not path.is_file():
        raise UpcycleError(f"`evaluation={path}` is not a file: give one of `upcycle eval --json`")
    expected = "what `upcycle eval --json` prints"
    value = read_json(path, expected)
    saved = _parse(TypeAdapter(Evaluation), value, path, expected)
    layers = {len(layer.load) for layer in saved.routing}
    experts = found.inspection.experts
    if layers != ({experts} if experts else set()):
        raise UpcycleError(
            f"`evaluation={path}` is of a model with {_experts(layers)}, but {found.model} has "
            f"{experts or 'none'}: evaluate that model"
        )
    total, own = saved.params.total, found.inspection.params_total
    if saved.model != public_name(found.model) and total != own:
        raise UpcycleError(
            f"`evaluation={path}` is of {saved.model} with {total:,} parameters, but {found.model} "
            f"has {own:,}: evaluate that model"
        )
    for layer in saved.routing:
        size = len(layer.load)
        if [len(row) for row in layer.co_selection] != [size] * size:
            raise UpcycleError(
                f"{path} is not {expected}: co_selection of layer {layer.layer} is not "
                f"{size} x {size}, as load says"
            )
    written = _parse(TypeAdapter(list[Sample]), value.get("samples", []), path, expected)
    return Measured(saved, written)


def _experts(numbers: set[int]) -> str:
    return f"{' or '.join(map(str, sorted(numbers))) or 'no'} experts per layer"


def evaluate_model(
    model: str,
    texts: list[str],
    against: str | None,
    tokens: int,
    seq_len: int,
    progress: Progress,
) -> Measured:
    """What `upcycle eval` would print, and what the model writes.

    Raises:
        UpcycleError: as `evaluate` does.
    """
    evaluation = evaluate(
        model, texts, against=against, tokens=tokens, seq_len=seq_len, progress=progress
    )
    written = samples(model, against, lambda done, total: progress("writing", done, total))
    return Measured(evaluation, written)


def _parse(kind: TypeAdapter[Read], value: Any, where: Path | str, expected: str) -> Read:
    """A value from JSON as one of this kind."""
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        raise UpcycleError(f"{where} is not {expected}: {first_problem(error)}") from error


def check_page(out: Path, *, overwrite: bool) -> None:
    """Raise what can be known of the page's place before the work.

    Raises:
        UpcycleError: it exists, is a folder, or has no folder to lie in.
    """
    if out.is_dir():
        raise UpcycleError(f"`out={out}` is a folder: give a file such as {out / 'report.html'}")
    if out.exists() and not overwrite:
        raise UpcycleError(f"`out={out}` exists: choose another, or `overwrite`")
    if not out.parent.is_dir():
        raise UpcycleError(f"`out={out}`: the folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK):
        raise UpcycleError(f"`out={out}`: {out.parent} is not writable")
