"""One file, one dense family; one line here registers it."""

import upcycle.families.gemma
import upcycle.families.granite
import upcycle.families.llama
import upcycle.families.mistral
import upcycle.families.olmo2
import upcycle.families.phi3
import upcycle.families.qwen2
import upcycle.families.qwen3
from upcycle.families.base import FAMILIES, DenseFamily, describe

__all__ = ["FAMILIES", "DenseFamily", "describe"]
