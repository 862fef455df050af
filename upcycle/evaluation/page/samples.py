"""What the model writes, beside the dense model."""

from collections.abc import Sequence
from typing import Any

from upcycle.evaluation.page.section import Section
from upcycle.evaluation.sample import TOKENS, Sample


def written(samples: Sequence[Sample]) -> Section:
    """Per prompt, what the dense model and this one go on to write; once, if it is the same."""
    if not samples:
        return None
    return {
        "note": f"Always the likeliest token, {TOKENS} at most.",
        "rows": [{"prompt": sample.prompt, "texts": _texts(sample)} for sample in samples],
    }


def _texts(sample: Sample) -> list[dict[str, Any]]:
    if sample.against is None:
        return [_text("this model", sample.text)]
    if sample.against == sample.text:
        return [_text("dense and this model", sample.text)]
    return [_text("dense", sample.against), _text("this model", sample.text)]


def _text(who: str, text: str) -> dict[str, Any]:
    return {"who": who, "text": text.strip() or "(nothing)"}
