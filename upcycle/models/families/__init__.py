"""One file, one dense family; one line here registers it."""

import upcycle.models.families.arcee
import upcycle.models.families.cwm
import upcycle.models.families.ernie4_5
import upcycle.models.families.eurobert
import upcycle.models.families.gemma
import upcycle.models.families.gemma4_text
import upcycle.models.families.glm
import upcycle.models.families.granite
import upcycle.models.families.granite_swa
import upcycle.models.families.granitemoehybrid
import upcycle.models.families.helium
import upcycle.models.families.hyperclovax
import upcycle.models.families.lfm2
import upcycle.models.families.llama
import upcycle.models.families.ministral
import upcycle.models.families.ministral3
import upcycle.models.families.mistral
import upcycle.models.families.nemotron_h
import upcycle.models.families.olmo2
import upcycle.models.families.phi3
import upcycle.models.families.qwen2
import upcycle.models.families.qwen3
import upcycle.models.families.qwen3_5_text
import upcycle.models.families.seed_oss
import upcycle.models.families.smollm3
import upcycle.models.families.t5
import upcycle.models.families.youtu
from upcycle.models.families.base import (
    FAMILIES,
    DenseFamily,
    auto_class,
    describe,
    is_encoder,
)

__all__ = ["FAMILIES", "DenseFamily", "auto_class", "describe", "is_encoder"]
