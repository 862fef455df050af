"""Names and numbers as text."""

import math
import re
from collections.abc import Sequence
from pathlib import PurePath


def public_name(label: str) -> str:
    """A hub id as it is; of a path only the last part, as the page may be published."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", label)
    return label if is_id else PurePath(label).name or label


def digits(value: float, number: int = 3) -> str:
    """So many significant digits, with no exponent where that is readable."""
    if not math.isfinite(value):
        return str(value)
    rounded = f"{value:.{number - 1}e}"
    exponent = int(rounded.partition("e")[2])
    if not -4 <= exponent < 6:
        return rounded
    return f"{value:,.{max(number - 1 - exponent, 0) if value else 0}f}"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def listing(numbers: Sequence[int]) -> str:
    """`layers 0, 1 and 29`."""
    *first, last = map(str, numbers)
    return f"layers {', '.join(first)} and {last}" if first else f"layer {last}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{digits(seconds, 2)} s"
