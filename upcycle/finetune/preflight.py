"""What shows that training can't be carried out before torch is imported, which takes seconds:
its settings, and the names of what it reads."""

from typing import Any

from upcycle.core.errors import UpcycleError
from upcycle.core.paths import check_model
from upcycle.finetune.settings import Training, load_training
from upcycle.models.text import check_text, texts, weighted


def check_finetuning(model: str, preset: str | None, settings: dict[str, Any]) -> None:
    """Of `finetune`, which looks at the rest.

    Raises:
        UpcycleError: as it does.
    """
    # Which preset is the default, and which model the teacher, the model's record says later.
    loaded = load_training(preset or "heal", settings, origin=model)
    check_model(model)
    check_texts(loaded)


def check_texts(request: Training) -> None:
    """Of what is trained and validated on, by their names.

    Raises:
        UpcycleError: a text is none, or is not for that.
    """
    for text, weight in weighted(request.data):
        check_text(text, "data")
        if not weight:
            raise UpcycleError(f"`data={request.data}` has {text!r} count 0 times: leave it out")
    for text in texts(request.validate_also or "probes"):
        check_text(text, "validate_also")
