"""An evaluation: a row per text, then what the model is and does."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from upcycle.console.output import out, show_notes, table, told_apart
from upcycle.core.words import count

if TYPE_CHECKING:
    from upcycle.evaluation.encoders import HiddenEvaluation
    from upcycle.evaluation.measured import Evaluation, TextResult
    from upcycle.evaluation.tasks import TaskScores
    from upcycle.models.record.check import HiddenResult


def show_evaluation(report: "Evaluation") -> None:
    """A line per text, then what the model is and does, then tasks."""
    title = report.model if report.against is None else f"{report.model} against {report.against}"
    _show_texts(title, report)
    _show_top_ks(report)
    table("", _routing(report) | _cost(report) | _speed(report))
    if report.tasks is not None:
        _show_tasks(report.tasks, ["model"] if report.against is None else ["model", "dense"])
    out.print(
        f"Measured on {report.tokens:,} tokens of each text, windows of {report.window}.",
        highlight=False,
    )
    for result in report.texts:
        if not math.isfinite(result.perplexity):
            show_notes([f"on {result.text} perplexity is {result.perplexity}: the logits overflow"])
        if result.fitted:
            show_notes([f"the model was fitted on {result.text}: on other text it may lose more"])


def show_hidden(report: "HiddenEvaluation") -> None:
    """Of an encoder: a line per text, then what the model is and does."""
    show_hidden_texts(f"{report.model} against {report.against}", report.texts)
    table("", _routing(report) | _cost(report))
    out.print(
        f"Hidden states on {report.tokens:,} tokens of each text, windows of {report.window}.",
        highlight=False,
    )


def show_hidden_texts(title: str, texts: "Sequence[HiddenResult]") -> None:
    numbers = {
        name: (
            *(f"{text.error:.3f}", f"{text.worst_window:.3f}"),
            *(f"{text.cosine:.4f}", f"{text.pooled_cosine:.4f}"),
        )
        for name, text in zip(told_apart(t.kind for t in texts), texts, strict=True)
    }
    table(title, numbers, "error", "worst window", "cosine", "cosine of means")


def _show_texts(title: str, report: "Evaluation") -> None:
    headings = ["perplexity"]
    if report.against is not None:
        headings += ["dense", "ratio", "worst window", "KL, nats", "same next token"]
    rows = {}
    for name, result in zip(told_apart(r.text for r in report.texts), report.texts, strict=True):
        numbers = [f"{result.perplexity:.3f}"]
        if report.against is not None:
            numbers += [
                f"{result.perplexity_against:.3f}",
                f"{result.perplexity_ratio:.4f}",
                f"{result.worst_window_ratio:.4f}",
                f"{result.kl:.4f}",
                f"{100 * (result.top1_agreement or 0):.1f} %",
            ]
        rows[name] = tuple(numbers)
    table(title, rows, *headings)


def _show_top_ks(report: "Evaluation") -> None:
    """A row for each number of experts per token: what is active, then perplexity on each text, and
    beside the dense model's."""
    if not report.top_ks:
        return

    def cell(result: "TextResult") -> str:
        beside = result.perplexity_ratio
        return f"{result.perplexity:.3f}" + ("" if beside is None else f" ({beside:.3f} ×)")

    rows = {
        f"{at.top_k}{', its own' if at.own else ''}": (
            f"{count(at.active)}, {100 * at.active_share:.0f} %",
            *(cell(result) for result in at.texts),
        )
        for at in report.top_ks
    }
    table("experts per token", rows, "active", *told_apart(r.text for r in report.texts))
    show_notes(f"--top-k {at.top_k}: {at.note}" for at in report.top_ks if at.note)


def _show_tasks(scores: "TaskScores", headings: list[str]) -> None:
    def cells(values: tuple[float | None, ...]) -> tuple[str, ...]:
        return tuple("" if value is None else f"{value:.4f}" for value in values[: len(headings)])

    rows = {
        f"{task}, {metric}": cells(values)
        for task, metrics in scores.items()
        for metric, values in metrics.items()
    }
    table("lm-eval", rows, *headings)


def _routing(report: "Evaluation | HiddenEvaluation") -> dict[str, str]:
    if not report.routing:
        return {}
    loads = [share for layer in report.routing for share in layer.load]
    dead = sum(layer.dead for layer in report.routing)
    worst = min(report.routing, key=lambda layer: layer.entropy)
    cosines = [layer.cosine for layer in report.similarity]
    return {
        "MoE layers": f"{len(report.routing)}",
        "expert load": f"{min(loads):.2f} to {max(loads):.2f} × fair share",
        "load entropy": f"{worst.entropy:.3f} at least (layer {worst.layer}); 1 is even",
        "dead experts": f"{dead} of {len(loads)}",
        "expert similarity": f"{sum(cosines) / len(cosines):.3f} (mean cosine; 1 for copies)",
    }


def _cost(report: "Evaluation | HiddenEvaluation") -> dict[str, str]:
    def cell(mine: int, dense: int | None) -> str:
        return count(mine) + ("" if dense is None else f" (dense {count(dense)})")

    params, flops = report.params, report.flops
    return {
        "parameters": cell(params.total, params.total_against),
        "active per token": cell(params.active, params.active_against),
        "FLOPs per token": cell(flops.active, flops.active_against),
    }


def _speed(report: "Evaluation") -> dict[str, str]:
    speed = report.speed
    if speed is None:
        return {}

    def cell(mine: float, dense: float | None) -> str:
        beside = "" if dense is None else f" (dense {dense:.0f}: {mine / dense:.2f} ×)"
        return f"{mine:.0f} tokens/s{beside}"

    return {
        "prefill": cell(speed.prefill, speed.prefill_against),
        "decode": cell(speed.decode, speed.decode_against),
        "timed with": f"batch {speed.batch_size}, {speed.threads} threads, {speed.dtype}, "
        f"experts by {speed.experts_implementation}, {speed.machine}",
    }
