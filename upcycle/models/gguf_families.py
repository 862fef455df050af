"""How llama.cpp's converter stores each family: under which keys, names and values.

Read in llama.cpp's conversion scripts of November 2026, with whose files this was compared.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.core.errors import UpcycleError
from upcycle.models.gguf_file import GgufFile, Metadata
from upcycle.models.gguf_restored import (
    as_they_are,
    from_gemma,
    from_halves,
    from_hybrid,
    from_mamba,
    from_qwen3_5,
)
from upcycle.models.gguf_rope import DIVISORS, rope_fields

HEAD = "output.weight"
TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
Fields = dict[str, Any]


def one(name: str) -> tuple[str, ...]:
    return (name,)


@dataclass(frozen=True)
class Stored:
    """A family in GGUF files."""

    model_type: str
    fields: Callable[[GgufFile, Metadata], Fields]
    """The config's. What it takes from the metadata is understood."""
    spelled: Callable[[str], tuple[str, ...]] = one
    """What the converter calls a tensor, or those that it cuts its rows into, before it looks the
    name up in the gguf package's table."""
    restored: Callable[[str, Tensor, PreTrainedConfig], Tensor] = as_they_are
    """A tensor's values as transformers has them, from those of the name in the file."""
    beside: Callable[[PreTrainedConfig], dict[str, str]] = lambda config: {}
    """Tensors that transformers passes over, by their names in the file; they may be there."""


def _shape(file: GgufFile, meta: Metadata) -> Fields:
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


def _rope(file: GgufFile, meta: Metadata, shape: Fields, *, partial: bool = False) -> Fields:
    context = shape["max_position_embeddings"]
    return rope_fields(file, meta, shape["head_dim"], context, partial=partial)


def llama_like(file: GgufFile, meta: Metadata, *, partial: bool = False) -> Fields:
    """Of a family whose layers are all alike, and attention alone."""
    shape = _shape(file, meta)
    own = {
        "intermediate_size": meta.number("feed_forward_length"),
        "num_key_value_heads": meta.number("attention.head_count_kv", shape["num_attention_heads"]),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
    }
    return shape | own | _rope(file, meta, shape, partial=partial)


def with_biases(**switches: str) -> Callable[[GgufFile, Metadata], Fields]:
    """Of a family whose config has a switch for each of these tensors."""

    def fields(file: GgufFile, meta: Metadata) -> Fields:
        found = {name: f"blk.0.{tensor}.bias" in file.tensors for name, tensor in switches.items()}
        return llama_like(file, meta) | found

    return fields


def phi3(file: GgufFile, meta: Metadata) -> Fields:
    window = meta.take("attention.sliding_window") or None
    return llama_like(file, meta, partial=True) | {"sliding_window": window}


def granite(file: GgufFile, meta: Metadata) -> Fields:
    _check_rotated(file, meta)
    # Granite 4 without Mamba layers is stored as this, with what its config says of such layers.
    for key in [key for key in meta.rest if key.startswith("ssm.")]:
        meta.take(key)
    meta.take("expert_shared_feed_forward_length")
    biases = {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}
    return with_biases(**biases)(file, meta) | _multipliers(meta)


def _check_rotated(file: GgufFile, meta: Metadata) -> None:
    """llama.cpp takes this key for whether a granite has a rotary embedding."""
    if meta.rest.get("rope.scaling.finetuned") is False:
        raise UpcycleError(
            f"{file.label} sets granite.rope.scaling.finetuned=False, a granite without a rotary "
            "embedding, which transformers' granite has no words for: give its safetensors"
        )


def _multipliers(meta: Metadata) -> Fields:
    return {
        "attention_multiplier": meta.number("attention.scale", 1.0),
        "embedding_multiplier": meta.number("embedding_scale", 1.0),
        "residual_multiplier": meta.number("residual_scale", 1.0),
        "logits_scaling": meta.number("logit_scale", 1.0),
    }


def granitemoehybrid(file: GgufFile, meta: Metadata) -> Fields:
    """The converter keeps neither `max_position_embeddings` nor the size of chunks, which changes
    nothing but rounding."""
    rotated = meta.take("rope.scaling.finetuned", True)
    shape = _shape(file, meta)
    kv_heads = meta.per_layer("attention.head_count_kv", shape["num_hidden_layers"])
    width = meta.number("feed_forward_length")
    inner, heads = meta.number("ssm.inner_size"), meta.number("ssm.time_step_rank")
    own = {
        "intermediate_size": width,
        "shared_intermediate_size": meta.number("expert_shared_feed_forward_length", width),
        "num_key_value_heads": max(kv_heads),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "layer_types": [FULL if count else LINEAR for count in kv_heads],
        "position_embedding_type": "rope" if rotated else "nope",
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "mamba_d_conv": meta.number("ssm.conv_kernel"),
        "mamba_d_state": meta.number("ssm.state_size"),
        "mamba_n_groups": meta.number("ssm.group_count"),
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_expand": inner // shape["hidden_size"],
        "mamba_conv_bias": _is_there(file, "ssm_conv1d.bias"),
        "mamba_proj_bias": _is_there(file, "ssm_in.bias"),
        "attention_bias": _is_there(file, "attn_q.bias"),
    }
    return shape | own | _rope(file, meta, shape) | _multipliers(meta)


def _is_there(file: GgufFile, end: str) -> bool:
    """Whether a tensor of that name is in some layer."""
    return any(name.startswith("blk.") and name.endswith(f".{end}") for name in file.tensors)


def nemotron_h(file: GgufFile, meta: Metadata) -> Fields:
    """As of granitemoehybrid; without a rotary embedding, whatever the keys of one say."""
    for key in ("rope.scaling.finetuned", "rope.dimension_count", "rope.freq_base"):
        meta.take(key)
    shape = _shape(file, meta)
    layers = shape["num_hidden_layers"]
    kv_heads = meta.per_layer("attention.head_count_kv", layers)
    widths = meta.per_layer("feed_forward_length", layers)
    inner, heads = meta.number("ssm.inner_size"), meta.number("ssm.time_step_rank")
    eps = meta.take("attention.layer_norm_rms_epsilon")
    own = {
        "layers_block_type": [
            "mlp" if width else FULL if count else LINEAR
            for width, count in zip(widths, kv_heads, strict=True)
        ],
        "intermediate_size": max(widths),
        "num_key_value_heads": max(kv_heads),
        "layer_norm_epsilon": meta.number("attention.layer_norm_epsilon", eps),
        "conv_kernel": meta.number("ssm.conv_kernel"),
        "ssm_state_size": meta.number("ssm.state_size"),
        "n_groups": meta.number("ssm.group_count"),
        "mamba_num_heads": heads,
        "mamba_head_dim": inner // heads,
        "use_conv_bias": _is_there(file, "ssm_conv1d.bias"),
        "use_bias": _is_there(file, "ssm_in.bias"),
        "mamba_proj_bias": _is_there(file, "ssm_in.bias"),
    }
    return shape | own


def lfm2(file: GgufFile, meta: Metadata) -> Fields:
    shape = _shape(file, meta)
    kv_heads = meta.per_layer("attention.head_count_kv", shape["num_hidden_layers"])
    own = {
        "intermediate_size": meta.number("feed_forward_length"),
        "block_auto_adjust_ff_dim": False,  # the width is what it was made
        "num_key_value_heads": max(kv_heads),
        "layer_types": [FULL if count else "conv" for count in kv_heads],
        "norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": meta.number("shortconv.l_cache"),
        "conv_bias": _is_there(file, "shortconv.in_proj.bias"),
    }
    return shape | own | _rope(file, meta, shape)


def qwen3_5(file: GgufFile, meta: Metadata) -> Fields:
    drafts = meta.take("nextn_predict_layers", 0)
    shape = _shape(file, meta)
    layers = shape["num_hidden_layers"] - drafts
    inner, heads = meta.number("ssm.inner_size"), meta.number("ssm.time_step_rank")
    own = {
        "num_hidden_layers": layers,
        "mtp_num_hidden_layers": drafts,
        "intermediate_size": meta.number("feed_forward_length"),
        "num_key_value_heads": meta.number("attention.head_count_kv"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "layer_types": _linear_layers(meta, layers, drafts),
        "attention_bias": _is_there(file, "attn_q.bias"),
        "linear_conv_kernel_dim": meta.number("ssm.conv_kernel"),
        "linear_key_head_dim": meta.number("ssm.state_size"),
        "linear_num_key_heads": meta.number("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": inner // heads,
    }
    # How positions in an image are told apart; in text, all axes have the same.
    sections = [size for size in meta.take("rope.dimension_sections", []) if size]
    fields = shape | own | _rope(file, meta, shape, partial=True)
    if sections:
        fields["rope_parameters"] |= {"mrope_section": sections, "mrope_interleaved": True}
    return fields


def _linear_layers(meta: Metadata, layers: int, drafts: int) -> list[str]:
    interval = meta.number("full_attention_interval", 4)
    found = [bool((layer + 1) % interval) for layer in range(layers)]
    if "attention.recurrent_layers" in meta.rest:
        found = [bool(n) for n in meta.per_layer("attention.recurrent_layers", layers + drafts)]
    return [LINEAR if linear else FULL for linear in found[:layers]]


def drafts_of_qwen3_5(config: PreTrainedConfig) -> dict[str, str]:
    """The layers behind the model's, and what is around the first of them."""
    first = config.num_hidden_layers
    around = {
        "eh_proj": "fc",
        "enorm": "pre_fc_norm_embedding",
        "hnorm": "pre_fc_norm_hidden",
        "shared_head_norm": "norm",
    }
    found = {f"blk.{first}.nextn.{k}.weight": f"mtp.{v}.weight" for k, v in around.items()}
    return found | {
        f"blk.{first + layer}.{stored}.weight": f"mtp.layers.{layer}.{name}.weight"
        for layer in range(config.mtp_num_hidden_layers)
        for stored, name in ATTENTION_LAYER.items()
    }


ATTENTION_LAYER = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    **{f"attn_{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
"""Of Qwen3.5."""


def gemma4(file: GgufFile, meta: Metadata) -> Fields:
    """The converter does not keep `use_bidirectional_attention`, which is of images."""
    shape = _shape(file, meta)
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


def unused_keys_of_gemma4(config: PreTrainedConfig) -> dict[str, str]:
    """Layers that share keys and values have matrices for them that nobody uses."""
    last = config.num_hidden_layers
    return {
        f"blk.{layer}.attn_{stored}.weight": f"model.layers.{layer}.self_attn.{name}.weight"
        for layer in range(last - config.num_kv_shared_layers, last)
        for stored, name in {"k": "k_proj", "v": "v_proj", "k_norm": "k_norm"}.items()
    }


def _with_scalar(name: str) -> tuple[str, ...]:
    return (re.sub(r"\.layer_scalar$", ".layer_scalar.weight", name),)


def _with_time_step(name: str) -> tuple[str, ...]:
    return (re.sub(r"\.dt_bias$", ".dt_proj.bias", name),)


def _names_of_hybrid(name: str) -> tuple[str, ...]:
    """Gate and up are one matrix in transformers."""
    layer, fused, _ = name.partition("shared_mlp.input_linear")
    if fused:
        return tuple(f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up"))
    return _with_time_step(name.replace("shared_mlp.output_linear", "mlp.down_proj"))


def _names_of_nemotron(name: str) -> tuple[str, ...]:
    return _with_time_step(re.sub(r"^model\.", "backbone.", name))


ATTENTION_AND_MLP = {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}
STORED = {
    "arcee": Stored("arcee", with_biases(**ATTENTION_AND_MLP), restored=from_halves),
    "ernie4_5": Stored("ernie4_5", with_biases(use_bias="attn_q")),
    "gemma": Stored("gemma", llama_like, restored=from_gemma),
    "gemma4": Stored("gemma4_text", gemma4, spelled=_with_scalar, beside=unused_keys_of_gemma4),
    "granite": Stored("granite", granite, restored=from_halves),
    "granitehybrid": Stored(
        "granitemoehybrid", granitemoehybrid, spelled=_names_of_hybrid, restored=from_hybrid
    ),
    "lfm2": Stored("lfm2", lfm2),
    "llama": Stored("llama", with_biases(**ATTENTION_AND_MLP), restored=from_halves),
    # Of the models of this name, those that scale no queries are mistrals.
    "mistral3": Stored("mistral", llama_like, restored=from_halves),
    "nemotron_h": Stored("nemotron_h", nemotron_h, spelled=_names_of_nemotron, restored=from_mamba),
    "olmo2": Stored("olmo2", with_biases(attention_bias="attn_q")),
    "phi3": Stored("phi3", phi3),
    "qwen2": Stored("qwen2", llama_like),
    "qwen3": Stored("qwen3", with_biases(attention_bias="attn_q")),
    "qwen35": Stored(
        "qwen3_5_text",
        qwen3_5,
        spelled=_with_time_step,
        restored=from_qwen3_5,
        beside=drafts_of_qwen3_5,
    ),
    "seed_oss": Stored(
        "seed_oss", with_biases(attention_bias="attn_q", attention_out_bias="attn_output")
    ),
    "smollm3": Stored("smollm3", with_biases(**ATTENTION_AND_MLP), restored=from_halves),
}
"""By the architecture that the files name."""
