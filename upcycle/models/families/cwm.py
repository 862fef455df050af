"""Code World Model: llama with a sliding window on some layers."""

from upcycle.models.families.base import ANY, FAMILIES, DenseFamily

# pretraining_tp only ever changed the order of summation.
FAMILIES.add("cwm", DenseFamily("cwm", inert={"pretraining_tp": ANY}))
