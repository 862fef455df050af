"""The measured speed, as a section of the model card of a folder that upcycle wrote."""

import os
import re
from pathlib import Path

import jinja2

from upcycle.core.errors import UpcycleError
from upcycle.core.paths import local_path, write_whole
from upcycle.evaluation.measured import Evaluation
from upcycle.models.record.file import RECORD

CARD = "README.md"
BEGIN, END = "<!-- upcycle eval --speed -->", "<!-- end of upcycle eval --speed -->"
SECTION = """\
{{ begin }}

## Speed

{% if speed.prefill_against %}
| tokens per second | dense | this model | |
|---|---|---|---|
| prefill | {{ "%.0f" | format(speed.prefill_against) }} | {{ "%.0f" | format(speed.prefill) }} \
| {{ "%.2f" | format(speed.prefill / speed.prefill_against) }} × |
| decode | {{ "%.1f" | format(speed.decode_against) }} | {{ "%.1f" | format(speed.decode) }} \
| {{ "%.2f" | format(speed.decode / speed.decode_against) }} × |
{% else %}
| tokens per second | this model |
|---|---|
| prefill | {{ "%.0f" | format(speed.prefill) }} |
| decode | {{ "%.1f" | format(speed.decode) }} |
{% endif %}

Measured by `upcycle eval --speed` in transformers on {{ speed.machine }}, \
{{ speed.threads }} CPU thread{{ "" if speed.threads == 1 else "s" }}, in {{ speed.dtype }}: \
{{ speed.batch_size }} sequence{{ "" if speed.batch_size == 1 else "s" }} of {{ window }} tokens \
at once, experts by `{{ speed.experts_implementation }}`.

{{ end }}
"""


def check_card(model: str, *, speed: bool) -> None:
    """Raise before the work what would keep its result from being written to the card.

    Raises:
        UpcycleError: speed is not measured, or the model is no folder of ours that can be written.
    """
    if not speed:
        raise UpcycleError("`card` writes the measured speed to the model card: add `speed`")
    folder = local_path(model)
    if not folder.is_dir():
        raise UpcycleError(
            f"`card` writes to the card of a folder here, which {model} is not: give the folder "
            "that upcycle wrote"
        )
    if not (folder / RECORD).is_file():
        raise UpcycleError(
            f"`card`: {model} holds no {RECORD}, so upcycle did not write it and leaves its "
            "card alone: drop `card`"
        )
    if not os.access(folder, os.W_OK):
        raise UpcycleError(f"`card`: {model} is not writable: make it so, or drop `card`")
    _read(folder / CARD)


def write_speed(evaluation: Evaluation) -> None:
    """Add the speed to the evaluated folder's card, in place of one that was measured before.

    Raises:
        UpcycleError: as `check_card`.
    """
    check_card(evaluation.model, speed=evaluation.speed is not None)
    path = local_path(evaluation.model) / CARD
    former = re.sub(f"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n*", "\n\n", _read(path), flags=re.S)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    section = environment.from_string(SECTION).render(
        speed=evaluation.speed, window=evaluation.window, begin=BEGIN, end=END
    )
    write_whole(path, f"{former.rstrip()}\n\n{section}\n".lstrip())


def _read(card: Path) -> str:
    try:
        return card.read_text(encoding="utf-8") if card.is_file() else ""
    except UnicodeDecodeError as error:
        raise UpcycleError(f"`card`: {card} is not UTF-8 text: restore or delete it") from error
