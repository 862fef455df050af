"""What a check's numbers mean for somebody who wants to use the model."""

import math
from dataclasses import dataclass
from typing import Literal

Grade = Literal["fine", "heal", "broken"]
FINE, BROKEN = 1.1, 5.0
"""Perplexity over the dense model's on the worst kind of text: up to the one a model may be used as
it is; from the other it writes nonsense."""
LAW_TOKENS, LAW_POWER = 5_000, -0.14
"""What healing leaves of the logarithm of the perplexity ratio: (tokens / 5,000)^-0.14 in the runs
of `LAW_MODEL` (dev/log.md)."""
LAW_MODEL = "three runs of 16k to 131k tokens of one model, SmolLM2-135M at half,"
HEALING = ((1.3, 20_000), (1.5, 400_000))
"""About how many tokens of `upcycle finetune` bring a ratio, up to the one given, to 1.25, by this
law. Larger ratios take millions."""
OUTLIER = 1.5
"""A kind that lost so many times what the others did was missing in the calibration."""


@dataclass(frozen=True)
class Verdict:
    """Whether a model is fine as it is, and if not, what to do."""

    grade: Grade
    tokens: int | None
    """To heal it, one digit of them."""
    add: str | None
    """The kind of text that the calibration lacks, if one stands out."""


def healed(ratio: float, tokens: int) -> float:
    """About what healing on so many tokens makes of a perplexity ratio."""
    left = min(1.0, math.pow(tokens / LAW_TOKENS, LAW_POWER))
    return math.pow(ratio, left)


def verdict(ratios: dict[str, float]) -> Verdict:
    """Of the perplexity ratios by kind of text; the worst one counts."""
    worst = max(ratios, key=lambda kind: ratios[kind])
    ratio = ratios[worst]
    others = sorted(value for kind, value in ratios.items() if kind != worst)
    add = worst if others and ratio > OUTLIER * others[-1] else None
    if ratio <= FINE:
        return Verdict("fine", None, None)
    tokens = next((tokens for most, tokens in HEALING if ratio <= most), None)
    return Verdict("heal" if ratio < BROKEN else "broken", tokens, add)
