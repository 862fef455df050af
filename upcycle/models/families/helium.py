"""Helium 1: llama with a rotary embedding that turns neighbouring channels."""

from upcycle.models.families.base import FAMILIES, DenseFamily
from upcycle.models.rotary import paired_as_llama
from upcycle.models.traits import Trait

FAMILIES.add(
    "helium",
    DenseFamily("helium", attention_bias=frozenset({Trait.QKV_BIAS}), rewrite=paired_as_llama),
)
