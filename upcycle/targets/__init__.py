"""One file, one native MoE architecture; one line here registers it."""

import upcycle.targets.flex_olmo
import upcycle.targets.glm4_moe
import upcycle.targets.granitemoeshared
import upcycle.targets.mixtral
import upcycle.targets.qwen2_moe
import upcycle.targets.qwen3_moe
from upcycle.targets.base import (
    TARGETS,
    Combine,
    Gains,
    MoESpec,
    MoETarget,
    Runtime,
    SharedWidth,
    common_fields,
    older_spellings,
)

__all__ = [
    "TARGETS",
    "Combine",
    "Gains",
    "MoESpec",
    "MoETarget",
    "Runtime",
    "SharedWidth",
    "common_fields",
    "older_spellings",
]
