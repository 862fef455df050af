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
PUBLISHED = {"qwen3_5": QWEN3_5}
DRAFTS = ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")


def make_published(folder: Path, name: str, *, dtype=torch.float32, **text_fields):
    """Write a random model with this published config, and what lies beside it, to the folder."""
    torch.manual_seed(0)
    fields = PUBLISHED[name] | {"dtype": str(dtype).removeprefix("torch.")}
    fields = fields | {"text_config": fields["text_config"] | text_fields}
    config = CONFIG_MAPPING[name](**{k: v for k, v in fields.items() if k != "model_type"})
    model = AutoModelForImageTextToText.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("norm.weight", "bias")):
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.to(dtype).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"qwen3_5": draft_layer, "gemma4": lambda tensors: {}}[name](tensors)
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
