"""train_log.jsonl: what a training run notes of its steps and validations."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, FiniteFloat, ValidationError

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import first_problem, parse_json, read_text
from upcycle.core.json_text import json_text
from upcycle.models.record.part import Measured, Part
from upcycle.models.record.training import Alarm

TRAIN_LOG = "train_log.jsonl"


class Validation(Part):
    """Of the held-out text; the last two against the dense model."""

    loss: Measured | None = None
    perplexity: Measured | None = None
    perplexity_ratio: Measured | None = None
    kl: Measured | None = None


class Routing(Part):
    """How the held-out tokens were shared out."""

    experts: int
    """Of all layers."""
    starved: int
    """Experts with next to nothing of their fair share."""
    imbalance: Measured
    """The busiest expert's load over the fair share, the mean over layers."""
    worst_imbalance: Measured
    """What it would be if all tokens went to the same experts."""


class LogLine(Part):
    """A line of train_log.jsonl: of a step, or of a validation after it."""

    step: int
    loss: Measured | None = None
    next_token: Measured | None = None
    distill: Measured | None = None
    match_layers: Measured | None = None
    hoyer: Measured | None = None
    balance: Measured | None = None
    z_loss: Measured | None = None
    grad_norm: Measured | None = None
    lr: Measured | None = None
    imbalance: Measured | None = None
    """The busiest expert's load over the fair share, the mean over layers."""
    dead: int | None = None
    """Experts that no token of the step selected."""
    tokens_per_second: FiniteFloat | None = None
    validation: Validation | None = None
    texts: dict[str, Measured] = Field(default_factory=dict)
    """Perplexity of the held-out part of each text."""
    routing: Routing | None = None
    alarms: list[Alarm] = Field(default_factory=list)


def log_text(row: Mapping[str, Any]) -> str:
    """A line of train_log.jsonl of plain values."""
    return json_text(LogLine.model_validate(row).plain()) + "\n"


def read_log(path: Path) -> list[LogLine]:
    """A train_log.jsonl.

    Raises:
        UpcycleError: a line is not one of training or of validation.
    """
    return list(_log_lines(path))


def _log_lines(path: Path) -> Iterator[LogLine]:
    expected = "what `upcycle finetune` writes"
    for number, text in enumerate(read_text(path, expected).splitlines(), 1):
        if not text.strip():
            continue
        where = f"line {number} of {path}"
        try:
            yield LogLine.model_validate(parse_json(text, where, expected))
        except ValidationError as error:
            raise UpcycleError(f"{where} is not {expected}: {first_problem(error)}") from error
