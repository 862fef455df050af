"""Models of several parts as their makers publish them: all switches of the published config.json,
with sizes scaled down, tensors under the names of the hub, and files beside them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import SIZES, make_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

LINEAR, FULL = "linear_attention", "full_attention"
QWEN3_5 = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": 260,
    "model_type": "qwen3_5",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 257,
        "full_attention_interval": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 48,
        "initializer_range": 0.2,
        "intermediate_size": 192,
        "layer_types": [LINEAR, LINEAR, LINEAR, FULL],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 16,
        "max_position_embeddings": 1024,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": SIZES["vocab_size"],
        "mamba_ssm_dtype": "float32",
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
        },
    },
    "tie_word_embeddings": True,
    "video_token_id": 261,
    "vision_config": {
        "deepstack_visual_indexes": [],
        "depth": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "in_channels": 3,
        "initializer_range": 0.2,
        "intermediate_size": 64,
        "model_type": "qwen3_5",
        "num_heads": 4,
        "num_position_embeddings": 16,
        "out_hidden_size": 48,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 263,
    "vision_start_token_id": 262,
}
SLIDING = "sliding_attention"
GEMMA4_VISION = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "default_output_length": 4,
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 32,
    "initializer_range": 0.2,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
    "model_type": "gemma4_vision",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
    "standardize": True,
    "use_clipped_linears": False,
}
GEMMA4_31B = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": None,
    "audio_token_id": 263,
    "boa_token_id": 264,
    "boi_token_id": 265,
    "eoa_token_index": 266,
    "eoi_token_id": 267,
    "image_token_id": 260,
    "initializer_range": 0.2,
    "model_type": "gemma4",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": True,
        "bos_token_id": 256,
        "dtype": "bfloat16",
        "enable_moe_block": False,
        "eos_token_id": 257,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 32,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 48,
        "hidden_size_per_layer_input": 0,
        "initializer_range": 0.2,
        "intermediate_size": 192,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL],
        "max_position_embeddings": 1024,
        "model_type": "gemma4_text",
        "moe_intermediate_size": None,
        "num_attention_heads": 4,
        "num_experts": None,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 0,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            FULL: {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
                "rope_type": "proportional",
            },
            SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 16,
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "use_bidirectional_attention": "vision",
        "use_cache": True,
        "use_double_wide_mlp": False,
        "vocab_size": SIZES["vocab_size"],
        "vocab_size_per_layer_input": SIZES["vocab_size"],
    },
    "tie_word_embeddings": True,
    "video_token_id": 261,
    "vision_config": GEMMA4_VISION,
    "vision_soft_tokens_per_image": 4,
}
GEMMA4_E4B = GEMMA4_31B | {
    "audio_config": {
        "attention_chunk_size": 12,
        "attention_context_left": 13,
        "attention_context_right": 0,
        "attention_logit_cap": 50.0,
        "conv_kernel_size": 5,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.2,
        "model_type": "gemma4_audio",
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "output_proj_dims": 24,
        "residual_weight": 0.5,
        "rms_norm_eps": 1e-06,
        "subsampling_conv_channels": [8, 4],
        "use_clipped_linears": True,
    },
    "text_config": GEMMA4_31B["text_config"]
    | {
        "attention_k_eq_v": False,
        "hidden_size_per_layer_input": 8,
        "num_global_key_value_heads": None,
        "num_kv_shared_layers": 2,
        "use_bidirectional_attention": None,
    },
    "vision_config": GEMMA4_VISION | {"standardize": False, "use_clipped_linears": True},
}
PUBLISHED = {"qwen3_5": QWEN3_5, "gemma4-31b": GEMMA4_31B, "gemma4-e4b": GEMMA4_E4B}
UNUSED = ("k_proj", "v_proj", "k_norm")
DRAFTS = ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")


def make_published(folder: Path, name: str, *, dtype=torch.float32, **text_fields):
    """Write a random model with this published config, and what lies beside it, to the folder."""
    torch.manual_seed(0)
    fields = PUBLISHED[name] | {"dtype": str(dtype).removeprefix("torch.")}
    fields = fields | {"text_config": fields["text_config"] | text_fields}
    given = {k: v for k, v in fields.items() if k != "model_type"}
    config = CONFIG_MAPPING[fields["model_type"]](**given)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("norm.weight", "bias")):
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.to(dtype).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= draft_layer(tensors) if name == "qwen3_5" else unused_keys(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # transformers writes what it has read, in its own spelling.
    (folder / "config.json").write_text(json.dumps(fields))
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / file).write_text('{"size": {"longest_edge": 16}}')
    make_tokenizer().save_pretrained(folder)
    return folder


def draft_layer(tensors):
    """What Qwen3.5 drafts tokens with: a layer like those of full attention, and what is around."""
    layer = "model.language_model.layers.3."
    drafts = {
        name.replace(layer, "mtp.layers.0."): torch.randn_like(tensor) * 0.2
        for name, tensor in tensors.items()
        if name.startswith(layer)
    }
    norm = tensors["model.language_model.norm.weight"]
    return drafts | {
        f"mtp.{name}.weight": torch.randn_like(norm) if name != "fc" else norm.new_ones(48, 96)
        for name in DRAFTS
    }


def unused_keys(tensors, config):
    """Gemma 4's layers that share keys and values have matrices for them that nobody uses."""
    text = config.text_config
    first = text.num_hidden_layers - text.num_kv_shared_layers
    place = "model.language_model.layers."
    return {
        name.replace(f"{place}0.", f"{place}{layer}."): tensor.clone()
        for name, tensor in tensors.items()
        for layer in range(first, text.num_hidden_layers)
        if name.startswith(f"{place}0.self_attn.") and name.split(".")[5] in UNUSED
    }
