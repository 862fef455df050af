"""ERNIE 4.5 (0.3B): llama with a rotary embedding of neighbouring channels.

`use_bias` would put biases on every projection, those of the FFN too. No published model has it,
and no target has a place for it.
"""

from upcycle.models.families.base import FAMILIES, DenseFamily
from upcycle.models.traits import Trait

FAMILIES.add(
    "ernie4_5",
    DenseFamily("ernie4_5", always={Trait.INTERLEAVED_ROTARY: "ernie4_5 always has it"}),
)
