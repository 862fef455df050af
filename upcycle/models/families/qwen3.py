"""Qwen3: llama with a norm per head on q and k."""

from upcycle.models.families.base import FAMILIES, DenseFamily
from upcycle.models.traits import Trait

FAMILIES.add("qwen3", DenseFamily("qwen3", always={Trait.QK_NORM: "qwen3 always has it"}))
