"""Units: what a run writes and notes as done at a time, a layer or what comes before or after."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from upcycle.core.errors import UpcycleError
from upcycle.core.types import all_finite
from upcycle.evaluation.distance import Meter
from upcycle.models.workspace import Workspace
from upcycle.models.writer import CheckpointWriter

SEEN, GATE = "seen", "gate"
"""Of a merge, what a unit's note says of the models' tensors and of the router's rows."""
PARTS = "parts"
"""The unit of tensors that are not the text model's."""


def write_unit(
    workspace: Workspace,
    writer: CheckpointWriter,
    unit: str,
    named: Iterable[tuple[str, Tensor]],
    record: dict[str, Any],
    meter: Meter | None = None,
) -> None:
    """Write tensors in their planned dtypes, then note that the unit is done.

    Args:
        meter: of a merge, what was shown the models' tensors, of which a note is taken, too.

    Raises:
        UpcycleError: a weight is too large for float16, perhaps by its gain.
    """
    for name, tensor in named:
        stored = tensor.to(writer.places[name].spec.dtype)
        # What is not converted may have bounds that are infinite.
        meant = unit == PARTS and not all_finite(tensor)
        if stored.dtype == torch.float16 and not all_finite(stored) and not meant:
            raise UpcycleError(f"{name} holds weights too large for float16: pass `dtype=bfloat16`")
        writer.write(name, stored)
    workspace.done(unit, record | ({SEEN: meter.plain()} if meter else {}))
