"""What shows that an evaluation can't be carried out before torch is imported, which takes seconds:
the names of what it reads."""

from collections.abc import Iterable

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
        check_text(text, "--text")
