"""What the parts of a record are made of."""

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

LARGEST = 1e300


def _not_absurd(value: float) -> float:
    """What a diverged run may leave: nothing finite that arithmetic would make infinite."""
    if math.isfinite(value) and abs(value) > LARGEST:
        raise ValueError(f"it is beyond {LARGEST:g}")
    return value


def _above_zero(value: float) -> float:
    """Or no number at all, as of logits that overflow."""
    if value <= 0:
        raise ValueError("it must be above 0")
    return value


Measured = Annotated[float, AfterValidator(_not_absurd)]
Positive = Annotated[Measured, AfterValidator(_above_zero)]
"""Checked only where a record is read."""


class Part(BaseModel):
    """Of a record."""

    model_config = ConfigDict(frozen=True, extra="allow")

    def plain(self) -> dict[str, Any]:
        """What was given, as plain values."""
        return self.model_dump(exclude_unset=True)
