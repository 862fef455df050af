"""One file, one native MoE architecture; one line here registers it."""

import upcycle.models.targets.flex_olmo
import upcycle.models.targets.glm4_moe
import upcycle.models.targets.granitemoehybrid
import upcycle.models.targets.granitemoeshared
import upcycle.models.targets.lfm2_moe
import upcycle.models.targets.mixtral
import upcycle.models.targets.nemotron_h
import upcycle.models.targets.qwen2_moe
import upcycle.models.targets.qwen3_moe
from upcycle.models.targets.base import (
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
