"""One file, one native MoE architecture; one line here registers it."""

import upcycle.models.targets.deepseek_v3
import upcycle.models.targets.ernie4_5_moe
import upcycle.models.targets.flex_olmo
import upcycle.models.targets.gemma4
import upcycle.models.targets.glm4_moe
import upcycle.models.targets.granitemoe_swa
import upcycle.models.targets.granitemoehybrid
import upcycle.models.targets.granitemoeshared
import upcycle.models.targets.laguna
import upcycle.models.targets.lfm2_moe
import upcycle.models.targets.mixtral
import upcycle.models.targets.nemotron_h
import upcycle.models.targets.qwen2_moe
import upcycle.models.targets.qwen3_5_moe
import upcycle.models.targets.qwen3_moe
import upcycle.models.targets.switch_transformers
from upcycle.models.runtimes import Runtime
from upcycle.models.targets.base import (
    TARGETS,
    Combine,
    Gains,
    MoESpec,
    MoETarget,
    SharedWidth,
    common_fields,
    older_spellings,
    unplaced,
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
    "unplaced",
]
