"""SmolLM3: as llama."""

from upcycle.models.gguf.architectures.base import STORED, Stored
from upcycle.models.gguf.fields import ATTENTION_AND_MLP, with_biases
from upcycle.models.gguf.restored import from_halves

STORED.add("smollm3", Stored("smollm3", with_biases(**ATTENTION_AND_MLP), restored=from_halves))
