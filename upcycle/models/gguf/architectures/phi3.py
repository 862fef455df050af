"""Phi-3 and Phi-4, whose window and original length have keys of their own."""

from upcycle.models.gguf.architectures.base import STORED, Stored
from upcycle.models.gguf.fields import Fields, llama_like
from upcycle.models.gguf.file import GgufFile
from upcycle.models.gguf.metadata import Metadata


def fields(file: GgufFile, meta: Metadata) -> Fields:
    window = meta.take("attention.sliding_window") or None
    original = meta.rest.get("rope.scaling.original_context_length")
    found = llama_like(file, meta, partial=True)
    original = found["max_position_embeddings"] if original is None else original
    return found | {"sliding_window": window, "original_max_position_embeddings": original}


STORED.add("phi3", Stored("phi3", fields))
