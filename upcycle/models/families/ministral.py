"""Ministral 8B: mistral with a sliding window on some layers, whose config.json may say mistral:
transformers tells them apart by `layer_types`."""

from upcycle.models.families.base import FAMILIES, DenseFamily

FAMILIES.add("ministral", DenseFamily("ministral"))
