"""The config fields that the metadata of most architectures says in the same way."""

from collections.abc import Callable
from typing import Any

from upcycle.core.errors import UpcycleError
from upcycle.models.gguf.file import GgufFile
from upcycle.models.gguf.metadata import Metadata
from upcycle.models.gguf.rope import rope_fields

HEAD = "output.weight"
TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
ATTENTION_AND_MLP = {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}
"""A tensor whose bias each switch of llama's config adds."""
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
Fields = dict[str, Any]


def shape_fields(file: GgufFile, meta: Metadata) -> Fields:
    """What every config says."""
    hidden, heads = meta.number("embedding_length"), meta.number("attention.head_count")
    head_dim = meta.number("attention.key_length", hidden // heads)
    size = meta.number("attention.value_length", head_dim)
    if size != head_dim:
        raise UpcycleError(
            f"{file.label} has keys of {head_dim} and values of {size} channels per head, which no "
            "native MoE has"
        )
    fields = {
        "vocab_size": meta.number("vocab_size", _vocabulary(file)),
        "hidden_size": hidden,
        "num_hidden_layers": meta.number("block_count"),
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "max_position_embeddings": meta.number("context_length"),
        "tie_word_embeddings": HEAD not in file.tensors,
        "dtype": "float32",
    }
    return fields | {name: file.value(key) for name, key in TOKENS.items()}


def _vocabulary(file: GgufFile) -> int | None:
    tokens = file.fields.get("tokenizer.ggml.tokens")
    return None if tokens is None else len(tokens.data)


def llama_like(file: GgufFile, meta: Metadata, *, partial: bool = False) -> Fields:
    """Of a family whose layers are all alike, and attention alone."""
    shape = shape_fields(file, meta)
    own = {
        "intermediate_size": meta.number("feed_forward_length"),
        "num_key_value_heads": meta.number("attention.head_count_kv", shape["num_attention_heads"]),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
    }
    return shape | own | rope_fields(file, meta, shape, partial=partial)


def with_biases(**switches: str) -> Callable[[GgufFile, Metadata], Fields]:
    """Of a family whose config has a switch for each of these tensors."""

    def fields(file: GgufFile, meta: Metadata) -> Fields:
        found = {name: f"blk.0.{tensor}.bias" in file.tensors for name, tensor in switches.items()}
        return llama_like(file, meta) | found

    return fields


def has_in_a_layer(file: GgufFile, end: str) -> bool:
    """Whether a tensor of that name is in some layer."""
    return any(name.startswith("blk.") and name.endswith(f".{end}") for name in file.tensors)
