"""Qwen3: llama with a norm per head on q and k."""

from upcycle.architecture import Trait
from upcycle.families.base import FAMILIES, DenseFamily

FAMILIES.add("qwen3", DenseFamily("qwen3", always={Trait.QK_NORM: "qwen3 always has it"}))
