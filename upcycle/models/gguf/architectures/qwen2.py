"""Qwen2 and Qwen2.5."""

from upcycle.models.gguf.architectures.base import STORED, Stored
from upcycle.models.gguf.fields import llama_like

STORED.add("qwen2", Stored("qwen2", llama_like))
