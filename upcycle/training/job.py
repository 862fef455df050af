"""A request to train, with its input found and its contradictions refused."""

import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.calibrate import check_seq_len, check_text, texts
from upcycle.errors import UpcycleError
from upcycle.report import versions
from upcycle.source import checkpoint_folder, fingerprint, read_config, read_headers
from upcycle.training.settings import Training, load_training


@dataclass(frozen=True)
class Job:
    """A request whose input is there."""

    label: str
    folder: Path
    record: dict[str, Any]
    """The model's upcycle.json, or nothing."""
    settings: Training
    teacher: Path | None
    out: Path


def open_job(
    model: str, out: Path, preset: str | Path | None, settings: dict[str, Any], stack: ExitStack
) -> Job:
    folder = stack.enter_context(checkpoint_folder(model))
    record = _record(folder)
    origin = record.get("source", {}).get("name")
    request = load_training(preset or _default_preset(record), settings, origin)
    for text in texts(request.data):
        check_text(text, "--data")
    check_seq_len(request.seq_len, read_config(folder))
    _check_dtypes(model, folder)
    return Job(model, folder, record, request, _teacher_folder(request, folder, stack), out)


def _check_dtypes(label: str, folder: Path) -> None:
    """The result is written in one dtype, as `convert` writes it."""
    headers = read_headers(folder)
    found = {str(i.dtype) for name, i in headers.items() if not name.endswith("correction_bias")}
    if len(found) > 1:
        raise UpcycleError(
            f"{label} holds weights in {' and '.join(sorted(found))}: store it in one dtype first"
        )


def _record(folder: Path) -> dict[str, Any]:
    """upcycle.json, or nothing."""
    path = folder / "upcycle.json"
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UpcycleError(f"{path} is not what upcycle writes: restore or delete it") from error
    return record if isinstance(record, dict) else {}


def _default_preset(record: dict[str, Any]) -> str:
    lossy = record.get("plan", {}).get("method") in ("split", "prune")
    return "heal" if lossy else "specialise"


def _teacher_folder(request: Training, folder: Path, stack: ExitStack) -> Path | None:
    if request.teacher is None or not (request.distill or request.match_layers):
        return None
    try:
        teacher = stack.enter_context(checkpoint_folder(request.teacher))
    except UpcycleError as error:
        raise UpcycleError(f"--teacher: {error}") from error
    theirs, ours = read_config(teacher).vocab_size, read_config(folder).vocab_size
    if theirs != ours:
        raise UpcycleError(
            f"--teacher {request.teacher} has a vocabulary of {theirs:,}, but the model of "
            f"{ours:,}: name the dense model that it was made from"
        )
    if request.match_layers and _depth_and_width(teacher) != _depth_and_width(folder):
        raise UpcycleError(
            f"--match-layers {request.match_layers} compares layer by layer, but --teacher "
            f"{request.teacher} has {' layers of '.join(map(str, _depth_and_width(teacher)))} and "
            f"the model {' layers of '.join(map(str, _depth_and_width(folder)))}: use --distill"
        )
    return teacher


def _depth_and_width(folder: Path) -> tuple[int, int]:
    config = read_config(folder)
    return config.num_hidden_layers, config.hidden_size


def job_fingerprint(job: Job, processes: int) -> str:
    """Of everything that the result depends on."""
    models = [folder for folder in (job.folder, job.teacher) if folder is not None]
    files = [Path(name).expanduser() for name in texts(job.settings.data)]
    ingredients = {
        "models": [
            fingerprint(folder, {info.file for info in read_headers(folder).values()})
            for folder in models
        ],
        "data": [hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()],
        "request": job.settings.settings(),
        "processes": processes,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
