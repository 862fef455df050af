"""Granite 3: llama with four multipliers."""

from upcycle.models.families.base import FAMILIES, DenseFamily

FAMILIES.add("granite", DenseFamily("granite"))
