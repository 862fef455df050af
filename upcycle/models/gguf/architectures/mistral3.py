"""Mistral. Of the models of this name, those that scale no queries are mistrals."""

from upcycle.models.gguf.architectures.base import STORED, Stored
from upcycle.models.gguf.fields import llama_like
from upcycle.models.gguf.restored import from_halves

STORED.add("mistral3", Stored("mistral", llama_like, restored=from_halves))
