"""Ministral 8B: mistral with a sliding window on some layers."""

from upcycle.models.families.base import FAMILIES, DenseFamily

FAMILIES.add("ministral", DenseFamily("ministral"))
