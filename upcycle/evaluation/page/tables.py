"""Measurements beside the dense model's that are best read as a table."""

from collections.abc import Sequence
from typing import Any

from upcycle.evaluation.measured import Evaluation
from upcycle.evaluation.page.section import Section
from upcycle.evaluation.page.words import digits


def speed(evaluation: Evaluation) -> Section:
    """Tokens per second, beside the dense model's if they were measured."""
    measured = evaluation.speed
    if not measured:
        return None
    rows = [
        ("reading the prompt", *_beside(measured.prefill, measured.prefill_against)),
        ("writing", *_beside(measured.decode, measured.decode_against)),
    ]
    threads = f"{measured.threads} thread" + ("" if measured.threads == 1 else "s")
    note = (
        f"Batch size {measured.batch_size}, {measured.dtype}, on {threads}; experts computed "
        f"by {measured.experts_implementation}."
    )
    return _sheet("speed", "Tokens per second: higher is better", note, rows)


def tasks(evaluation: Evaluation) -> Section:
    """Scores of lm-eval's tasks."""
    scores = evaluation.tasks
    if not scores:
        return None
    rows = [
        (f"{task}, {metric}", *_beside(*pair))
        for task, metrics in scores.items()
        for metric, pair in metrics.items()
    ]
    return _sheet("tasks", "Benchmarks", "Run by lm-eval.", rows)


def _beside(model: float | None, dense: float | None) -> list[str]:
    """The dense model's number, this model's, and their ratio."""
    ratio = None if model is None or not dense else model / dense
    return [
        *("–" if value is None else digits(value) for value in (dense, model)),
        "–" if ratio is None else f"× {digits(ratio)}",
    ]


def _sheet(name: str, title: str, note: str, rows: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    headings = ("dense", "this model", "ratio")
    return {"id": name, "title": title, "note": note, "headings": headings, "rows": rows}
