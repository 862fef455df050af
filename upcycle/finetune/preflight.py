"""What shows that training can't be carried out before torch is imported, which takes seconds:
its settings, and the names of what it reads."""

from typing import Any

from upcycle.core.paths import check_model
from upcycle.finetune.settings import load_training
from upcycle.models.text import check_text, texts


def check_finetuning(model: str, preset: str | None, settings: dict[str, Any]) -> None:
    """Of `finetune`, which looks at the rest.

    Raises:
        UpcycleError: as it does.
    """
    # Which preset is the default, and which model the teacher, the model's record says later.
    loaded = load_training(preset or "heal", settings, origin=model)
    check_model(model)
    for text in texts(loaded.data):
        check_text(text, "data")
