"""What shows that an evaluation can't be carried out before torch is imported, which takes seconds:
the names of what it reads, and numbers of experts."""

from collections.abc import Iterable

from upcycle.core.errors import UpcycleError
from upcycle.core.paths import check_model
from upcycle.models.text import check_text


def check_evaluation(model: str, against: str | None, named: Iterable[str]) -> None:
    """Of `eval` and `report`, which look at the rest.

    Raises:
        UpcycleError: as they do.
    """
    for name in (model, against):
        if name is not None:
            check_model(name)
    for text in named:
        check_text(text, "text")


def top_ks_named(words: str) -> list[int]:
    """`4,8,16` as numbers.

    Raises:
        UpcycleError: it is something else.
    """
    parts = [part.strip() for part in words.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UpcycleError(f"`top_k={words!r}`: give numbers of experts per token, such as 4,8,16")
    return [int(part) for part in parts]
