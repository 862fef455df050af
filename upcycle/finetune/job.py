"""A request to train, with its input found and its contradictions refused."""

import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.versions import versions
from upcycle.finetune.activations import check_swap
from upcycle.finetune.preflight import check_texts
from upcycle.finetune.settings import Training, load_training
from upcycle.models.blocks import SELECTION_BIAS
from upcycle.models.calibration import check_seq_len, text_fingerprint
from upcycle.models.companions import check_own_files
from upcycle.models.config import read_config, read_text_config
from upcycle.models.families import is_dense
from upcycle.models.loading import check_decoder, check_trainable, kind_of
from upcycle.models.opening import checkpoint_folder, open_source
from upcycle.models.quantised import UNQUANTISED
from upcycle.models.record.file import RECORD, Identity, Made, Record, Source, Trained, read_record
from upcycle.models.shards import read_headers
from upcycle.models.weights import fingerprint


@dataclass(frozen=True)
class Job:
    """A request whose input is there."""

    label: str
    folder: Path
    record: Record
    """The model's upcycle.json; one that tells of nothing, if there is none."""
    settings: Training
    teacher: Path | None
    out: Path


def open_job(
    model: str, out: Path, preset: str | Path | None, settings: dict[str, Any], stack: ExitStack
) -> Job:
    folder = stack.enter_context(checkpoint_folder(model))
    check_decoder(model, folder)
    check_trainable(model, folder)
    check_own_files(folder)
    path = folder / RECORD
    record = read_record(path) if path.is_file() else Trained()
    origin = _origin(model, record, folder)
    request = load_training(preset or _default_preset(record), settings, origin)
    check_texts(request)
    check_seq_len(request.seq_len, read_text_config(folder))
    if request.activation is not None:
        check_swap(model, read_config(folder), request.activation)
    _check_dtypes(model, folder)
    made = record.plan.method if isinstance(record, Made) else "split"
    if request.train == "partition" and made != "split":
        raise UpcycleError(
            f"`train=partition` deals the neurons of a split out anew, but {model} was made by "
            f"{made}: give `train=moe`"
        )
    teacher = _teacher_folder(request, folder, stack)
    if teacher is not None and isinstance(record, Made) and settings.get("teacher") is None:
        _check_origin(record.source, teacher, folder)
    return Job(model, folder, record, request, teacher, out)


def _origin(label: str, record: Record, folder: Path) -> str | None:
    """The dense model that a model was made from, whose predictions it may learn, or that it is;
    of a merge there are several, and the base does not know what its experts do."""
    if is_dense(read_config(folder)):
        return label
    if not isinstance(record, Made) or record.plan.merge is not None:
        return None
    return record.source.model(folder)


def _check_dtypes(label: str, folder: Path) -> None:
    """The result is written in one dtype, as `convert` writes it."""
    headers = read_headers(folder)
    if any(info.packed is not None for info in headers.values()):
        raise UpcycleError(f"{label} holds quantised weights, which are not trained: {UNQUANTISED}")
    found = {str(i.dtype) for name, i in headers.items() if not name.endswith(SELECTION_BIAS)}
    if len(found) > 1:
        raise UpcycleError(
            f"{label} holds weights in {' and '.join(sorted(found))}: store it in one dtype first"
        )


def _check_origin(origin: Source, teacher: Path, folder: Path) -> None:
    """The name of the dense model may be a path that means another one by now, or from here."""
    if origin.fingerprint not in (None, open_source(str(teacher)).fingerprint()):
        raise UpcycleError(
            f"{folder / RECORD} says that the model was made from {origin.name}, but what "
            "has that name now is another: name the dense model by `teacher`, or give `distill=0`"
        )


def _default_preset(record: Record) -> str:
    lossy = isinstance(record, Made) and record.plan.method in ("split", "prune")
    return "heal" if lossy else "specialise"


def _teacher_folder(request: Training, folder: Path, stack: ExitStack) -> Path | None:
    if request.teacher is None or not (request.distill or request.match_layers):
        return None
    try:
        teacher = stack.enter_context(checkpoint_folder(request.teacher))
        _check_teacher(request, teacher)
    except UpcycleError as error:
        raise UpcycleError(f"`teacher`: {error}") from error
    theirs, ours = (read_text_config(each).vocab_size for each in (teacher, folder))
    if theirs != ours:
        raise UpcycleError(
            f"`teacher={request.teacher}` has a vocabulary of {theirs:,}, but the model of "
            f"{ours:,}: name the dense model that it was made from"
        )
    if request.match_layers and _depth_and_width(teacher) != _depth_and_width(folder):
        raise UpcycleError(
            f"{setting('match_layers', request.match_layers)} compares layer by layer, but "
            f"`teacher={request.teacher}` has "
            f"{' layers of '.join(map(str, _depth_and_width(teacher)))} and "
            f"the model {' layers of '.join(map(str, _depth_and_width(folder)))}: use `distill`"
        )
    return teacher


def _check_teacher(request: Training, teacher: Path) -> None:
    """It predicts the next token, of sequences as long as those that the model reads."""
    if (kind := kind_of(teacher)) != "a decoder":
        raise UpcycleError(
            f"{request.teacher} is {kind}, which teaches a decoder nothing: name the dense model "
            "that it was made from"
        )
    check_seq_len(request.seq_len, read_text_config(teacher))


def _depth_and_width(folder: Path) -> tuple[int, int]:
    config = read_text_config(folder)
    return config.num_hidden_layers, config.hidden_size


def job_identity(job: Job, processes: int, threads: int) -> Identity:
    """Of a run by so many processes of so many threads: everything that the result depends on."""
    models = [folder for folder in (job.folder, job.teacher) if folder is not None]
    read = (job.settings.data, job.settings.validate_also)
    ingredients = {
        "models": [fingerprint(folder) for folder in models],
        "data": [text_fingerprint(job.folder, text) for text in read if text is not None],
        "request": job.settings.settings(),
        "processes": processes,
        "versions": versions(),
        "threads": threads,
    }
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
    return Identity(digest, threads)
