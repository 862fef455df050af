"""A result that was just written, read again and compared with what it must equal."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle.core.errors import CheckFailed, UpcycleError
from upcycle.models.loading import load_model

TOLERANCE = 1e-3
"""Of `relative_error`: what is less is rounding, of weights in float32."""


def load_result(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """`load_model` of what was just written, whose faults are ours."""
    try:
        return load_model(folder, dtype, device)
    except UpcycleError as error:
        raise CheckFailed(str(error)) from error


def relative_error(logits: Tensor, reference: Tensor) -> float:
    """Root mean square difference over the reference's standard deviation."""
    return float((logits - reference).square().mean().sqrt() / reference.std())
