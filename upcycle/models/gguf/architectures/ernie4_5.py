"""ERNIE 4.5, of which one switch adds all biases."""

from upcycle.models.gguf.architectures.base import STORED, Stored
from upcycle.models.gguf.fields import with_biases

STORED.add("ernie4_5", Stored("ernie4_5", with_biases(use_bias="attn_q")))
