"""Granite 3: llama with four multipliers."""

from upcycle.families.base import FAMILIES, DenseFamily

FAMILIES.add("granite", DenseFamily("granite"))
