"""How good the model is: on all texts together, and on each beside the dense model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from upcycle.evaluation.measured import Evaluation, TextResult
from upcycle.evaluation.page import charts
from upcycle.evaluation.page.section import Section
from upcycle.evaluation.page.words import digits, percent, public_name
from upcycle.models.record.check import CheckReport, KindResult
from upcycle.models.record.file import Made
from upcycle.models.text import kind_name


@dataclass(frozen=True)
class Overall:
    """The numbers of all texts together: each has as many tokens, so perplexities have their
    geometric mean, and the rest its mean."""

    perplexity: float
    against: float | None
    ratio: float | None
    kl: float | None
    agreement: float | None


def overall(evaluation: Evaluation) -> Overall:
    rows = evaluation.texts
    logs = _mean([math.log(row.perplexity) for row in rows]) or 0.0
    against = _mean([row.perplexity_against and math.log(row.perplexity_against) for row in rows])
    return Overall(
        perplexity=math.exp(logs),
        against=None if against is None else math.exp(against),
        ratio=None if against is None else math.exp(logs - against),
        kl=_mean([row.kl for row in rows]),
        agreement=_mean([row.top1_agreement for row in rows]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def basis(evaluation: Evaluation) -> str:
    """What the numbers were measured on."""
    names = ", ".join(map(_name, evaluation.texts))
    each = "each of " if len(evaluation.texts) > 1 else ""
    return f"On {evaluation.tokens:,} tokens of {each}{names}, in windows of {evaluation.window}."


def texts(evaluation: Evaluation, made: Made | None) -> Section:
    """Dense against MoE on each text, and on the kinds that the conversion's check read; None for
    one text alone, of which the key numbers are."""
    check = made.check if made and isinstance(made.check, CheckReport) else None
    rows = [*evaluation.texts, *(map(_checked, check.kinds) if check else [])]
    if len(rows) < 2:
        return None
    values = [value for row in rows for value in (row.perplexity_against, row.perplexity)]
    top = charts.top([value for value in values if value is not None])
    note = ""
    if check:
        note = f"The conversion's own check read {check.tokens:,} tokens right after it."
    own = "MoE" if evaluation.routing else "this"
    return {"note": note, "rows": [_text_row(row, own, top) for row in rows]}


def _checked(kind: KindResult) -> TextResult:
    return TextResult(
        text=f"{kind_name(kind.kind)}, by the conversion's check",
        perplexity=kind.perplexity_moe,
        perplexity_against=kind.perplexity_dense,
        perplexity_ratio=kind.ratio,
        kl=kind.kl,
        top1_agreement=kind.top1_agreement,
        worst_window_ratio=kind.worst_window,
    )


def _text_row(row: TextResult, own: str, top: float) -> dict[str, Any]:
    bars = [
        {"label": label, "value": digits(value, 4), "part": charts.share(value, top)}
        | {"own": label == own}
        for label, value in (("dense", row.perplexity_against), (own, row.perplexity))
        if value is not None
    ]
    distance = ""
    if row.perplexity_ratio is not None and row.kl is not None and row.top1_agreement is not None:
        distance = (
            f"× {digits(row.perplexity_ratio, 4)}, KL {digits(row.kl)}, "
            f"same next token {percent(row.top1_agreement)}"
        )
    return {"name": _name(row), "bars": bars, "distance": distance}


def _name(row: TextResult) -> str:
    name = public_name(row.text)
    return f"{name} (the model was fitted on it)" if row.fitted else name
