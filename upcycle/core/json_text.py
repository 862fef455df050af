"""JSON that every reader takes."""

import json
import math
from typing import Any


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON. What is no number there is a string, "NaN", "Infinity" or "-Infinity", as
    pydantic spells it and reads it back as the float that it was."""
    return json.dumps(_spelt(value), indent=indent, allow_nan=False)


def _spelt(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _spelt(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_spelt(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
