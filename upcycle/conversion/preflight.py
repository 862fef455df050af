"""What shows that a conversion can't be carried out before torch is imported, which takes seconds:
its settings, and the names of what it reads."""

from typing import Any

from upcycle.conversion.catalogue import check_names
from upcycle.conversion.recipe import load_recipe
from upcycle.core.paths import check_model
from upcycle.models.text import check_text, texts


def check_conversion(
    model: str, recipe: str, revision: str | None, settings: dict[str, Any]
) -> None:
    """Of `plan` and `convert`, which look at the rest.

    Raises:
        UpcycleError: as they do.
    """
    loaded = load_recipe(recipe, settings)
    check_names(loaded)
    check_model(model, revision)
    for text in texts(loaded.calibration):
        check_text(text)
