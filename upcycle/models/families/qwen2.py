"""Qwen2 and Qwen2.5: llama with biases on q, k and v, and a window on some layers if asked."""

from upcycle.models.families.base import FAMILIES, DenseFamily
from upcycle.models.traits import Trait

FAMILIES.add("qwen2", DenseFamily("qwen2", always={Trait.QKV_BIAS: "qwen2 always has them"}))
