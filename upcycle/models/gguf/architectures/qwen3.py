"""Qwen3, whose attention has biases if asked."""

from upcycle.models.gguf.architectures.base import STORED, Stored
from upcycle.models.gguf.fields import with_biases

STORED.add("qwen3", Stored("qwen3", with_biases(attention_bias="attn_q")))
