"""Llama 2 and 3, and what copies their architecture (SmolLM2, TinyLlama, Yi)."""

from upcycle.models.families.base import ANY, FAMILIES, DenseFamily

# pretraining_tp only ever changed the order of summation.
FAMILIES.add("llama", DenseFamily("llama", inert={"pretraining_tp": ANY}))
