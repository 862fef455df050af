"""The runtimes beside transformers 5 whose limits upcycle knows, and how people spell them.

Without torch: a request is checked before it is imported.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from upcycle.core.registry import suggest

Runtime = Literal["llama.cpp", "vLLM", "MLX", "transformers 4"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)


@dataclass(frozen=True, slots=True)
class Run:
    """That a target was really run in a runtime, and its log-probabilities compared with those of
    transformers 5. What was not is known from the runtime's sources alone."""

    version: str
    date: str
    what: str
    """Which results, as the end of a sentence."""


OTHER_NAMES: dict[str, Runtime | None] = {
    "mlxlm": "MLX",
    # These run every result.
    "transformers": None,
    "transformers5": None,
}
"""Spelled as `_plain` does; None where there is nothing to hold a result to."""


def runtimes_named(words: Iterable[str]) -> tuple[Runtime, ...]:
    """The runtimes that a request names, each once, in their own order.

    Args:
        words: each a name, or several joined by commas; case, dots, dashes and spaces are free.

    Raises:
        ValueError: a name is no runtime's.
    """
    known = {_plain(name): name for name in RUNTIMES} | OTHER_NAMES
    named = set()
    for word in ",".join(words).split(","):
        if _plain(word) in ("", "none"):
            continue
        if _plain(word) not in known:
            names = (*RUNTIMES, "transformers 5")
            raise ValueError(
                f"{word.strip()!r} is no runtime that upcycle knows{suggest(word, names)}"
            )
        named.add(known[_plain(word)])
    return tuple(runtime for runtime in RUNTIMES if runtime in named)


def _plain(word: str) -> str:
    return re.sub(r"[^a-z0-9]", "", word.lower())
