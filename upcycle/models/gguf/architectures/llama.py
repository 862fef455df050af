"""Llama, and what copies its architecture."""

from upcycle.models.gguf.architectures.base import STORED, Stored
from upcycle.models.gguf.fields import ATTENTION_AND_MLP, with_biases
from upcycle.models.gguf.restored import from_halves

STORED.add("llama", Stored("llama", with_biases(**ATTENTION_AND_MLP), restored=from_halves))
