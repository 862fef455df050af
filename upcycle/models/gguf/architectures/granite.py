"""Granite 3, and Granite 4 without Mamba layers."""

from upcycle.core.errors import UpcycleError
from upcycle.models.gguf.architectures.base import STORED, Stored
from upcycle.models.gguf.fields import ATTENTION_AND_MLP, Fields, with_biases
from upcycle.models.gguf.file import GgufFile
from upcycle.models.gguf.metadata import Metadata
from upcycle.models.gguf.restored import from_halves


def fields(file: GgufFile, meta: Metadata) -> Fields:
    _check_rotated(file, meta)
    # Granite 4 without Mamba layers is stored as this, with what its config says of such layers.
    for key in [key for key in meta.rest if key.startswith("ssm.")]:
        meta.take(key)
    meta.take("expert_shared_feed_forward_length")
    return with_biases(**ATTENTION_AND_MLP)(file, meta) | multipliers(meta)


def _check_rotated(file: GgufFile, meta: Metadata) -> None:
    """llama.cpp takes this key for whether a granite has a rotary embedding."""
    if meta.rest.get("rope.scaling.finetuned") is False:
        raise UpcycleError(
            f"{file.label} sets granite.rope.scaling.finetuned=False, a granite without a rotary "
            "embedding, which transformers' granite has no words for: give its safetensors"
        )


def multipliers(meta: Metadata) -> Fields:
    return {
        "attention_multiplier": meta.number("attention.scale", 1.0),
        "embedding_multiplier": meta.number("embedding_scale", 1.0),
        "residual_multiplier": meta.number("residual_scale", 1.0),
        "logits_scaling": meta.number("logit_scale", 1.0),
    }


STORED.add("granite", Stored("granite", fields, restored=from_halves))
