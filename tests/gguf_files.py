"""GGUF files as llama.cpp's converter makes them of a model of transformers.

What it does to each family was read in its scripts, and the files that it makes of the same models
were compared with these.
"""

import json
import re
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

ATTENTION = {
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
LLAMA = ATTENTION | {
    "self_attn.qkv_proj": "attn_qkv",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
"""What a tensor is called, without its layer and its end."""
NORMS_AFTER = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def mamba(place: str) -> dict[str, str]:
    return {
        f"{place}.A_log": "ssm_a",
        f"{place}.D": "ssm_d",
        f"{place}.dt_bias": "ssm_dt.bias",
        f"{place}.conv1d": "ssm_conv1d",
        f"{place}.norm": "ssm_norm",
        f"{place}.in_proj": "ssm_in",
        f"{place}.out_proj": "ssm_out",
    }


OWN_NAMES = {
    "gemma4_text": NORMS_AFTER
    | {
        "pre_feedforward_layernorm": "ffn_norm",
        "layer_scalar": "layer_output_scale.weight",
        "per_layer_input_gate": "inp_gate",
        "per_layer_projection": "proj",
        "post_per_layer_input_norm": "post_norm",
        "model.embed_tokens_per_layer": "per_layer_token_embd",
        "model.per_layer_model_projection": "per_layer_model_proj",
        "model.per_layer_projection_norm": "per_layer_proj_norm",
    },
    "granitemoehybrid": mamba("mamba") | {"shared_mlp.output_linear": "ffn_down"},
    "lfm2": {
        "model.embedding_norm": "token_embd_norm",
        "operator_norm": "attn_norm",
        "ffn_norm": "ffn_norm",
        "self_attn.out_proj": "attn_output",
        "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w2": "ffn_down",
        "feed_forward.w3": "ffn_up",
        "conv.in_proj": "shortconv.in_proj",
        "conv.out_proj": "shortconv.out_proj",
        "conv.conv": "shortconv.conv",
    },
    "nemotron_h": mamba("mixer")
    | {name.replace("self_attn", "mixer"): stored for name, stored in ATTENTION.items()}
    | {
        "model.embeddings": "token_embd",
        "model.norm_f": "output_norm",
        "norm": "attn_norm",
        "mixer.up_proj": "ffn_up",
        "mixer.down_proj": "ffn_down",
    },
    "olmo2": NORMS_AFTER,
    "qwen3_5_text": mamba("linear_attn")
    | {
        "post_attention_layernorm": "post_attention_norm",
        "linear_attn.in_proj_qkv": "attn_qkv",
        "linear_attn.in_proj_z": "attn_gate",
        "linear_attn.in_proj_a": "ssm_alpha",
        "linear_attn.in_proj_b": "ssm_beta",
        "mtp.fc": "nextn.eh_proj",
        "mtp.pre_fc_norm_embedding": "nextn.enorm",
        "mtp.pre_fc_norm_hidden": "nextn.hnorm",
        "mtp.norm": "nextn.shared_head_norm",
    },
    "seed_oss": {"post_attention_layernorm": "post_attention_norm"},
}
ARCHITECTURES = {
    "gemma4_text": "gemma4",
    "granitemoehybrid": "granitehybrid",
    "mistral": "mistral3",
    "qwen3_5_text": "qwen35",
}
HALVES_IN_TURN = ("llama", "arcee", "granite", "granitemoehybrid", "mistral", "smollm3")
MORE_BY_ONE = ("gemma", "qwen3_5_text")
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


def write_gguf(
    path: Path, folder: Path, *, keys=None, tensors=None, without=(), part_size=0, quantise=None
) -> Path:
    """A tiny model as llama.cpp stores it.

    Args:
        keys: what its metadata says beside, or instead; `None` leaves a key out.
        tensors: beside the model's.
        without: names of tensors that are left out.
        part_size: tensors in a part.
        quantise: how matrices are stored; in float32, by default.
    """
    config = json.loads((folder / "config.json").read_text())
    name = config["model_type"]
    architecture = ARCHITECTURES.get(name, name)
    writer = gguf.GGUFWriter(str(path), architecture, split_max_tensors=part_size)
    for key, value in (_metadata(architecture, config) | (keys or {})).items():
        if value is not None:
            _add(writer, key, value)
    _add_tokenizer(writer, folder, config["vocab_size"])
    stored = _own_tensors(config)
    for hf_name, tensor in load_file(folder / "model.safetensors").items():
        stored |= _stored(hf_name, tensor, config)
    for tensor_name, array in (stored | (tensors or {})).items():
        if tensor_name not in without:
            if quantise and array.ndim == 2:
                writer.add_tensor(tensor_name, gguf.quantize(array, quantise), raw_dtype=quantise)
            else:
                writer.add_tensor(tensor_name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stored(name: str, tensor: torch.Tensor, config: dict) -> dict[str, np.ndarray]:
    """A tensor of transformers as the converter stores it."""
    place, part, end = NAME.fullmatch(name.replace("backbone.", "model.")).groups()
    layer = f"blk.{re.sub('[^0-9]', '', place)}." if "layers" in place else ""
    if "mtp" in name:
        layer = f"blk.{config['num_hidden_layers']}."
    if part == "shared_mlp.input_linear":
        gate, up = tensor.chunk(2)
        return {f"{layer}ffn_gate{end}": gate.numpy(), f"{layer}ffn_up{end}": up.numpy()}
    names = LLAMA | OWN_NAMES.get(config["model_type"], {})
    return {f"{layer}{names[part]}{end}": _values(part, tensor, config).numpy()}


NAME = re.compile(r"((?:(?:model|mtp)\.layers\.\d+\.)?)(.+?)((?:\.weight|\.bias)?)")


def _values(part: str, tensor: torch.Tensor, config: dict) -> torch.Tensor:
    family, kind = config["model_type"], part.split(".")[-1]
    if kind in ("q_proj", "k_proj") and family in HALVES_IN_TURN:
        heads = config[{"q": "num_attention_heads", "k": "num_key_value_heads"}[kind[0]]]
        tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
    if kind == "A_log":
        tensor = -tensor.exp()
    if "conv" in kind and tensor.ndim == 3:
        tensor = tensor.squeeze(1)
    if part.startswith("linear_attn"):
        return _values_in_turn(kind, tensor, config)
    if "norm" in kind and family in MORE_BY_ONE:
        tensor = tensor + 1
    if part.startswith(("mamba", "mixer")) and kind in ("A_log", "D"):
        tensor = tensor[:, None]
    if part in ("mamba.norm", "mixer.norm"):
        groups = config["mamba_n_groups"] if part == "mamba.norm" else config["n_groups"]
        tensor = tensor.unflatten(0, (groups, -1))
    return tensor


def _values_in_turn(kind: str, tensor: torch.Tensor, config: dict) -> torch.Tensor:
    """Heads of values: the first of each key's, then the second of each, and so on."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    sizes = {"in_proj_a": 1, "in_proj_b": 1, "A_log": 1, "dt_bias": 1}
    size = sizes.get(kind, config["linear_value_head_dim"])
    order = torch.arange(values).reshape(keys, values // keys).T.flatten()
    rows = (order[:, None] * size + torch.arange(size)).flatten()
    if kind in ("in_proj_qkv", "conv1d"):
        before = 2 * keys * config["linear_key_head_dim"]
        rows = torch.cat([torch.arange(before), before + rows])
    if kind == "norm":
        return tensor
    return tensor[:, rows] if kind == "out_proj" else tensor[rows]


def _metadata(name: str, config: dict) -> dict:
    below = _common(config) | OWN_KEYS.get(config["model_type"], lambda config: {})(config)
    return {f"{name}.{key}": value for key, value in below.items()}


def _common(config: dict) -> dict:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    return {
        "block_count": config.get("num_hidden_layers"),
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps"),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "vocab_size": config["vocab_size"],
    }


def _granite(config: dict) -> dict:
    return {
        "attention.scale": config["attention_multiplier"],
        "embedding_scale": config["embedding_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "logit_scale": config["logits_scaling"],
    }


def _granitemoehybrid(config: dict) -> dict:
    kinds, heads = config["layer_types"], config["mamba_n_heads"]
    return _granite(config) | {
        "attention.head_count_kv": [
            config["num_key_value_heads"] if kind == FULL else 0 for kind in kinds
        ],
        "context_length": 2**20,
        "expert_count": 0,
        "expert_used_count": 0,
        "expert_shared_feed_forward_length": config["shared_intermediate_size"],
        "rope.scaling.finetuned": False,
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.state_size": config["mamba_d_state"],
        "ssm.group_count": config["mamba_n_groups"],
        "ssm.inner_size": heads * config["mamba_d_head"],
        "ssm.time_step_rank": heads,
    }


def _nemotron_h(config: dict) -> dict:
    kinds, heads = config["layers_block_type"], config["mamba_num_heads"]
    return {
        "attention.head_count_kv": [
            config["num_key_value_heads"] if kind == FULL else 0 for kind in kinds
        ],
        "feed_forward_length": [
            config["intermediate_size"] if kind == "mlp" else 0 for kind in kinds
        ],
        "block_count": len(kinds),
        "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        "expert_group_count": 1,
        "expert_group_used_count": 1,
        "rope.scaling.finetuned": False,
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.state_size": config["ssm_state_size"],
        "ssm.group_count": config["n_groups"],
        "ssm.inner_size": heads * config["mamba_head_dim"],
        "ssm.time_step_rank": heads,
    }


def _lfm2(config: dict) -> dict:
    return {
        "attention.head_count_kv": [
            config["num_key_value_heads"] if kind == FULL else 0 for kind in config["layer_types"]
        ],
        "feed_forward_length": 192,
        "attention.layer_norm_rms_epsilon": config["norm_eps"],
        "shortconv.l_cache": config["conv_L_cache"],
        **dict.fromkeys(("attention.key_length", "attention.value_length")),
    }


def _qwen3_5(config: dict) -> dict:
    drafts, heads = config.get("mtp_num_hidden_layers") or 0, config["linear_num_value_heads"]
    recurrent = [kind == LINEAR for kind in config["layer_types"]] + [False] * drafts
    return {
        "block_count": config["num_hidden_layers"] + drafts,
        "nextn_predict_layers": drafts or None,
        "attention.recurrent_layers": recurrent,
        "full_attention_interval": 4,
        "rope.dimension_sections": [2, 1, 1, 0],
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.inner_size": heads * config["linear_value_head_dim"],
        "ssm.time_step_rank": heads,
    }


def _gemma4(config: dict) -> dict:
    inside = [kind == SLIDING for kind in config["layer_types"]]
    full = _full_attention(config)
    heads = {True: config["num_key_value_heads"], False: full["num_key_value_heads"]}
    return {
        "attention.key_length": full["head_dim"],
        "attention.value_length": full["head_dim"],
        "attention.key_length_swa": config["head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "attention.head_count_kv": [heads[kind] for kind in inside],
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": inside,
        "attention.shared_kv_layers": config["num_kv_shared_layers"],
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
        "final_logit_softcapping": config["final_logit_softcapping"],
        "rope.freq_base": config["rope_parameters"][FULL]["rope_theta"],
        "rope.freq_base_swa": config["rope_parameters"][SLIDING]["rope_theta"],
        "rope.dimension_count": full["head_dim"],
        "rope.dimension_count_swa": config["head_dim"],
    }


def _full_attention(config: dict) -> dict:
    """Gemma 4's heads where all is seen."""
    return config | config["per_layer_config"][str(config["layer_types"].index(FULL))]


OWN_KEYS = {
    "gemma4_text": _gemma4,
    "granite": _granite,
    "granitemoehybrid": _granitemoehybrid,
    "lfm2": _lfm2,
    "nemotron_h": _nemotron_h,
    "qwen3_5_text": _qwen3_5,
}


def _own_tensors(config: dict) -> dict[str, np.ndarray]:
    """Gemma 4's divisors by which most channels are not rotated where all is seen."""
    if config["model_type"] != "gemma4_text":
        return {}
    half = _full_attention(config)["head_dim"] // 2
    turned = int(half * config["rope_parameters"][FULL]["partial_rotary_factor"])
    return {"rope_freqs.weight": np.array([1.0] * turned + [1e30] * (half - turned), np.float32)}


def _add(writer: gguf.GGUFWriter, key: str, value) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [*sorted(vocab, key=vocab.get), "ab"]
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
