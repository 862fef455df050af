"""What shows that a request can't be carried out before torch is imported, which takes seconds:
its settings, and the names of what it reads."""

from collections.abc import Iterable
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


def check_finetuning(model: str, preset: str | None, settings: dict[str, Any]) -> None:
    """Of `finetune`, which looks at the rest.

    Raises:
        UpcycleError: as it does.
    """
    from upcycle.finetune.settings import load_training

    # Which preset is the default, and which model the teacher, the model's record says later.
    loaded = load_training(preset or "heal", settings, origin=model)
    check_model(model)
    for text in texts(loaded.data):
        check_text(text, "--data")


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
