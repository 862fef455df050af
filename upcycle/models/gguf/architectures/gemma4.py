"""Gemma 4's text model."""

import re
from typing import Any

from transformers import PreTrainedConfig

from upcycle.core.errors import UpcycleError
from upcycle.models.gguf.architectures.base import STORED, Stored
from upcycle.models.gguf.fields import FULL, SLIDING, Fields, shape_fields
from upcycle.models.gguf.file import GgufFile
from upcycle.models.gguf.metadata import Metadata
from upcycle.models.gguf.rope import DIVISORS


def fields(file: GgufFile, meta: Metadata) -> Fields:
    """The converter does not keep `use_bidirectional_attention`, which is of images."""
    shape = shape_fields(file, meta)
    layers = shape["num_hidden_layers"]
    sliding = meta.per_layer("attention.sliding_window_pattern", layers)
    kv_heads = dict(zip(sliding, meta.per_layer("attention.head_count_kv", layers), strict=True))
    widths = meta.per_layer("feed_forward_length", layers)
    head_dim = meta.number("attention.key_length_swa", shape["head_dim"])
    meta.take("attention.value_length_swa")
    shared = meta.take("attention.shared_kv_layers", 0)
    own = {
        "intermediate_size": min(widths),
        "use_double_wide_mlp": max(widths) > min(widths),
        "num_key_value_heads": kv_heads.get(True, kv_heads.get(False)),
        "num_global_key_value_heads": kv_heads.get(False),
        "head_dim": head_dim,
        "global_head_dim": shape["head_dim"],
        "attention_k_eq_v": _lacks_values(file, sliding[: layers - shared]),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "layer_types": [SLIDING if inside else FULL for inside in sliding],
        "sliding_window": meta.number("attention.sliding_window"),
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": meta.take("embedding_length_per_layer_input", 0),
        "final_logit_softcapping": meta.take("final_logit_softcapping"),
    }
    if (embeddings := "per_layer_token_embd.weight") in file.tensors:
        own["vocab_size_per_layer_input"] = file.shape(embeddings)[0]
    return shape | own | {"rope_parameters": _two_ropes(file, meta, shape["head_dim"], head_dim)}


def _lacks_values(file: GgufFile, sliding: list[Any]) -> bool:
    """Whether layers of full attention take their keys for values."""
    full = [layer for layer, inside in enumerate(sliding) if not inside]
    return any(f"blk.{layer}.attn_v.weight" not in file.tensors for layer in full)


def _two_ropes(file: GgufFile, meta: Metadata, full_dim: int, head_dim: int) -> Fields:
    """Where layers see all, the last frequencies are divided by so much that nothing is rotated."""
    rotated, inside = (
        meta.number("rope.dimension_count", full_dim),
        meta.number("rope.dimension_count_swa", head_dim),
    )
    if (rotated, inside) != (full_dim, head_dim) or DIVISORS not in file.tensors:
        raise UpcycleError(
            f"{file.label} rotates {rotated} and {inside} channels of heads of {full_dim} and "
            f"{head_dim}, which with or without {DIVISORS} upcycle does not understand"
        )
    divisors = file.numbers(DIVISORS)
    turned = int((divisors == 1).sum())
    if 2 * len(divisors) != full_dim or bool((divisors[turned:] < 1e20).any()):
        raise UpcycleError(
            f"{file.label} scales its rotary embedding by {DIVISORS}, whose values are not those "
            "of gemma 4, and upcycle understands no others"
        )
    return {
        FULL: {
            "rope_type": "proportional",
            "rope_theta": meta.number("rope.freq_base", 1000000.0),
            "partial_rotary_factor": 2 * turned / full_dim,
        },
        SLIDING: {
            "rope_type": "default",
            "rope_theta": meta.number("rope.freq_base_swa", 10000.0),
        },
    }


def beside(config: PreTrainedConfig) -> dict[str, str]:
    """Layers that share keys and values have matrices for them that nobody uses."""
    last = config.num_hidden_layers
    return {
        f"blk.{layer}.attn_{stored}.weight": f"model.layers.{layer}.self_attn.{name}.weight"
        for layer in range(last - config.num_kv_shared_layers, last)
        for stored, name in {"k": "k_proj", "v": "v_proj", "k_norm": "k_norm"}.items()
    }


def spelled(name: str) -> tuple[str, ...]:
    return (re.sub(r"\.layer_scalar$", ".layer_scalar.weight", name),)


STORED.add("gemma4", Stored("gemma4_text", fields, spelled=spelled, beside=beside))
