"""What a check's numbers mean for somebody who wants to use the model."""

import math
from dataclasses import dataclass
from typing import Literal

Grade = Literal["fine", "heal", "broken"]
FINE, BROKEN = 1.1, 5.0
"""Perplexity over the dense model's on the worst kind of text: up to the one a model may be used as
it is; from the other it writes nonsense."""
LAW_UNIT = 131_072
"""Tokens of healing."""
LAW_GAIN, LAW_POWER = 0.32, 0.26
"""What so many take at most off the logarithm of the perplexity ratio, and the power of tokens by
which that grows, in the runs of `LAW_MODELS` (dev/log.md)."""
LAW_TOKENS = 16_384
"""The fewest that were measured."""
LAW_PASSES = 1.2
"""Times that any of these runs read its text at most: what comes of reading it again is not
measured."""
LAW_MODELS = "runs of SmolLM2-135M and Qwen2.5-Coder-0.5B"
AIM = 1.25
"""What a ratio is to be healed to."""
MILLIONS = 1_000_000
"""Tokens that are so many that their number is not worth saying."""
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
    """About what healing on so many tokens makes of a perplexity ratio above 1: nearly all of a
    small loss comes back, and of a large one no more than the tokens can bring."""
    lost, most = math.log(ratio), LAW_GAIN * (tokens / LAW_UNIT) ** LAW_POWER
    return math.exp(lost / (1 + most / lost))


def healing(ratio: float) -> int | None:
    """About how many tokens bring a ratio to `AIM`, one digit of them; None for millions.

    The law solved for its tokens.
    """
    lost = math.log(ratio)
    most = max(lost * (lost / math.log(AIM) - 1), 0.0)
    tokens = max(LAW_UNIT * (most / LAW_GAIN) ** (1 / LAW_POWER), LAW_TOKENS)
    rounded = float(f"{tokens:.0e}")
    return int(rounded) if rounded < MILLIONS else None


def verdict(ratios: dict[str, float]) -> Verdict:
    """Of the perplexity ratios by kind of text; the worst one counts."""
    worst = max(ratios, key=lambda kind: ratios[kind])
    ratio = ratios[worst]
    others = sorted(value for kind, value in ratios.items() if kind != worst)
    add = worst if others and ratio > OUTLIER * others[-1] else None
    if ratio <= FINE:
        return Verdict("fine", None, None)
    return Verdict("heal" if ratio < BROKEN else "broken", healing(ratio), add)
