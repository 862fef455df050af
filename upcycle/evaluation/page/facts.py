"""What the report page shows of a model, read from its folder and from saved evaluations.

An evaluation is read as the dataclass that it was written from. The models here hold what the page
uses of the other files. So a file that is not what it should be is an error with its name and
field, never half a page.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    FiniteFloat,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from upcycle.conversion.check import CheckReport
from upcycle.conversion.dense_layers import DenseLayers
from upcycle.conversion.inspection import inspect_model
from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import first_problem, parse_json
from upcycle.core.settings import Choice
from upcycle.evaluation.run import Evaluation, Progress, evaluate
from upcycle.evaluation.sample import Sample, samples
from upcycle.models.source import model_folder

RECORD = "upcycle.json"
TRAIN_LOG = "train_log.jsonl"
Read = TypeVar("Read")


class Inspection(BaseModel):
    """What `upcycle inspect` says; a dense model has no experts."""

    kind: str
    architecture: str
    experts: int = 0
    top_k: int = 0
    expert_size: int = 0

    @property
    def dense(self) -> bool:
        return self.kind == "dense"


class RecipeFacts(BaseModel, extra="allow"):
    name: str
    paper: str
    method: Choice
    split: Choice
    shared: float | None = None
    shared_by: Choice
    router: Choice | None
    compensate: Choice | None = None
    sequential: bool = False
    calibration: str


class PlanFacts(BaseModel):
    layers: int
    dense_layers: list[int]
    experts: int
    top_k: int
    expert_size: int
    shared_size: int
    active_ffn_ratio: FiniteFloat
    calibration_tokens: int
    warnings: list[str]
    runtimes: dict[str, str] = {}
    recipe: RecipeFacts


class Source(BaseModel):
    name: str
    revision: str | None


class TrainingSettings(BaseModel):
    name: str
    data: str


class Training(BaseModel):
    settings: TrainingSettings
    step: int
    """Whose state was kept."""
    tokens: int
    seconds: FiniteFloat


class Record(BaseModel):
    """upcycle.json, as `convert` writes it and `finetune` adds to it."""

    source: Source
    plan: PlanFacts
    check: CheckReport | None
    seconds: dict[str, FiniteFloat]
    peak_memory: int
    dense_layers: DenseLayers | None = None
    training: list[Training] = []
    versions: dict[str, str]

    @field_validator("check")
    @classmethod
    def _positive(cls, check: CheckReport | None) -> CheckReport | None:
        if check and not all(k.perplexity_dense > 0 and k.perplexity_moe > 0 for k in check.kinds):
            raise ValueError("perplexity_dense and perplexity_moe must be above 0")
        return check


def _not_absurd(value: float) -> float:
    """What a diverged run may log: nothing finite that arithmetic would make infinite."""
    if math.isfinite(value) and abs(value) > LARGEST:
        raise ValueError(f"it is beyond {LARGEST:g}")
    return value


LARGEST = 1e300
Logged = Annotated[float, AfterValidator(_not_absurd)]


class Validation(BaseModel):
    perplexity: Logged | None = None
    kl: Logged | None = None


class LogLine(BaseModel):
    """A line of train_log.jsonl."""

    step: int
    loss: Logged | None = None
    imbalance: Logged | None = None
    tokens_per_second: FiniteFloat | None = None
    validation: Validation | None = None


@dataclass(frozen=True)
class Facts:
    """What the page shows of a model, but what is measured."""

    model: str
    inspection: Inspection
    made: Record | None
    log: list[LogLine]


@dataclass(frozen=True)
class Measured:
    """What the page shows that takes running the model."""

    evaluation: Evaluation
    samples: list[Sample]


def gather(model: str) -> Facts:
    """The facts that lie in the model's folder.

    Raises:
        UpcycleError: it is no model, or a file beside its weights is not what upcycle writes.
    """
    inspection = Inspection.model_validate(inspect_model(model))
    folder = model_folder(model, None)
    record, log = None, []
    if folder is not None and (folder / RECORD).is_file():
        record = read_record(folder / RECORD)
    if folder is not None and (folder / TRAIN_LOG).is_file():
        log = read_log(folder / TRAIN_LOG)
    return Facts(model, inspection, record, log)


def read_record(path: Path) -> Record | None:
    """An upcycle.json; None if it tells of training only, as upcycle did not make the model.

    Raises:
        UpcycleError: it is something else.
    """
    expected = "what upcycle writes"
    record = parse_json(_read(path), path, expected)
    if isinstance(record, dict) and "training" in record and "plan" not in record:
        return None
    return _parse(TypeAdapter(Record), record, path, expected)


def read_evaluation(path: Path, found: Facts) -> Measured:
    """A saved `upcycle eval --json` of the model that `gather` found this of, and the `samples`
    that it may hold.

    Raises:
        UpcycleError: it is missing, something else, or of another model.
    """
    if not path.is_file():
        raise UpcycleError(f"--evaluation {path} is not a file: give one of `upcycle eval --json`")
    expected = "what `upcycle eval --json` prints"
    value = parse_json(_read(path), path, expected)
    saved = _parse(TypeAdapter(Evaluation), value, path, expected)
    layers = {len(layer.load) for layer in saved.routing}
    experts = found.inspection.experts
    if layers != ({experts} if experts else set()):
        raise UpcycleError(
            f"--evaluation {path} is of a model with {_experts(layers)}, but {found.model} has "
            f"{experts or 'none'}: evaluate that model"
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


def read_log(path: Path) -> list[LogLine]:
    """The lines of a train_log.jsonl.

    Raises:
        UpcycleError: a line is not one of training or of validation.
    """
    expected, lines, kind = "what `upcycle finetune` writes", [], TypeAdapter(LogLine)
    for number, text in enumerate(_read(path).splitlines(), 1):
        where = f"line {number} of {path}"
        if text.strip():
            lines.append(_parse(kind, parse_json(text, where, expected), where, expected))
    return lines


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UpcycleError(f"{path} is not text: restore or delete it") from error


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
        raise UpcycleError(f"-o {out} is a folder: give a file such as {out / 'report.html'}")
    if out.exists() and not overwrite:
        raise UpcycleError(f"-o {out} exists: choose another, or --overwrite")
    if not out.parent.is_dir():
        raise UpcycleError(f"-o {out}: the folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK):
        raise UpcycleError(f"-o {out}: {out.parent} is not writable")
