"""One file, one dense family; one line here registers it."""

import upcycle.models.families.arcee
import upcycle.models.families.gemma
import upcycle.models.families.granite
import upcycle.models.families.granitemoehybrid
import upcycle.models.families.lfm2
import upcycle.models.families.llama
import upcycle.models.families.mistral
import upcycle.models.families.nemotron_h
import upcycle.models.families.olmo2
import upcycle.models.families.phi3
import upcycle.models.families.qwen2
import upcycle.models.families.qwen3
from upcycle.models.families.base import FAMILIES, DenseFamily, describe, is_dense

__all__ = ["FAMILIES", "DenseFamily", "describe", "is_dense"]
