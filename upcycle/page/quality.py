"""How good the model is: on all texts together, and on each beside the dense model."""

import math
from typing import Any

from upcycle import charts
from upcycle.page.section import Facts, Section
from upcycle.page.words import digits, percent, public_name


def overall(evaluation: Facts) -> dict[str, Any]:
    """The numbers of all texts together: each has as many tokens, so perplexities have their
    geometric mean, and the rest its mean."""
    rows = evaluation["texts"]

    def mean(key: str) -> float | None:
        values = [row[key] for row in rows]
        return None if None in values else sum(values) / len(values)

    def geometric(key: str) -> float | None:
        values = [row[key] for row in rows]
        return None if None in values else math.exp(sum(map(math.log, values)) / len(values))

    return {
        "perplexity": geometric("perplexity"),
        "against": geometric("perplexity_against"),
        "ratio": geometric("perplexity_ratio"),
        "kl": mean("kl"),
        "agreement": mean("top1_agreement"),
    }


def texts(evaluation: Facts, made: Facts | None) -> Section:
    """Dense against MoE on each text, and on that which the conversion held back."""
    rows = [dict(row, name=_name(row)) for row in evaluation["texts"]]
    check = made and made["check"]
    if check:
        dense, moe = check["perplexity_dense"], check["perplexity_moe"]
        rows.append(
            dict(check, name="held back by the conversion", perplexity=moe)
            | {"perplexity_against": dense, "perplexity_ratio": moe / dense}
        )
    values = [row[key] for row in rows for key in ("perplexity_against", "perplexity")]
    top = charts.top([value for value in values if value is not None])
    note = f"{evaluation['tokens']:,} tokens of each text, in windows of {evaluation['window']}."
    if check:
        note += f" The conversion's own check read {check['tokens']:,} tokens right after it."
    own = "MoE" if evaluation["routing"] else "this"
    return {"note": note, "rows": [_text_row(row, own, top) for row in rows]}


def _name(row: Facts) -> str:
    name = public_name(row["text"])
    return f"{name} (the model was fitted on it)" if row["fitted"] else name


def _text_row(row: Facts, own: str, top: float) -> dict[str, Any]:
    bars = [
        {"label": label, "value": digits(value, 4), "part": charts.share(value, top)}
        | {"own": label == own}
        for label, value in (("dense", row["perplexity_against"]), (own, row["perplexity"]))
        if value is not None
    ]
    distance = ""
    if row["perplexity_ratio"] is not None:
        distance = (
            f"× {digits(row['perplexity_ratio'], 4)}, KL {digits(row['kl'])}, "
            f"same next token {percent(row['top1_agreement'])}"
        )
    return {"name": row["name"], "bars": bars, "distance": distance}
