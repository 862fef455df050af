"""Qwen2 and Qwen2.5: llama with biases on q, k and v, and a window on some layers if asked."""

from upcycle.architecture import Trait
from upcycle.families.base import FAMILIES, DenseFamily

FAMILIES.add("qwen2", DenseFamily("qwen2", always={Trait.QKV_BIAS: "qwen2 always has them"}))
