"""Seed-OSS, with a switch of its own for the bias of what attention puts out."""

from upcycle.models.gguf.architectures.base import STORED, Stored
from upcycle.models.gguf.fields import with_biases

STORED.add(
    "seed_oss",
    Stored("seed_oss", with_biases(attention_bias="attn_q", attention_out_bias="attn_output")),
)
