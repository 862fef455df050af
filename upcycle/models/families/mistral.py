"""Mistral 7B and its descendants: llama with a sliding window on every layer."""

from upcycle.models.families.base import FAMILIES, DenseFamily

FAMILIES.add("mistral", DenseFamily("mistral"))
