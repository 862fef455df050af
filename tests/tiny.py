"""Tiny random dense models, one per family, built in process.

Initial std 0.2 and distinct sizes, so that a lost gain or swapped matrices change the logits by
as much as their own spread.
"""

import inspect
import json
import shutil
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)

SIZES = {
    "vocab_size": 272,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
QUICK = {
    "split": "contiguous",
    "calibration": "builtin",
    "calibration_tokens": 64,
    "seq_len": 64,
    "check": "none",
}
"""A conversion that is quick, where what it makes of the weights does not matter."""
FAMILIES = {
    "arcee": {},
    "llama": {},
    "mistral": {"sliding_window": 16, "head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {"sliding_window": 16},
    "gemma": {"head_dim": 16},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "olmo2": {},
    "ministral": {
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "cwm": {"head_dim": 16, "sliding_window": 16},
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 1024,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "eurobert": {"mask_token_id": 258},
    "seed_oss": {"head_dim": 16},
    "glm": {"head_dim": 16},
    "helium": {"head_dim": 12},
    "hyperclovax": {
        "use_post_norm": False,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
        "logits_scaling": 0.3,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite_swa": {
        "sliding_window": 16,
        "layer_rope_theta": [1e4, 0, 500.0],
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "ernie4_5": {"head_dim": 16},
    "youtu": {
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    },
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 16,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
        "pad_token_id": 0,
    },
    "qwen3_5_text": {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "granitemoehybrid": {
        "shared_intermediate_size": 192,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
        "mamba_n_heads": 4,
        "mamba_d_head": 24,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "mlp"],
        "head_dim": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 24,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "lfm2": {
        "intermediate_size": 288,  # of which the class makes 192
        "block_multiple_of": 16,
        "layer_types": ["conv", "full_attention", "conv"],
        "tie_word_embeddings": False,
    },
}
TEXT = SIZES | {"head_dim": 16}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
CLIP = TOWER | {"model_type": "clip_vision_model", "projection_dim": 16}
PIXTRAL = TOWER | {"model_type": "pixtral", "head_dim": 8}
MISTRAL = TEXT | {"model_type": "mistral", "sliding_window": None, "rope_theta": 1000000000.0}
HOLDERS = {
    "idefics3": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": TOWER,
        "image_token_id": 260,
    },
    "internvl": {
        "text_config": TEXT | {"model_type": "qwen3"},
        "vision_config": TOWER | {"image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": 260,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": CLIP,
        "image_token_index": 260,
    },
    "llava_next": {
        "text_config": MISTRAL,
        "vision_config": CLIP,
        "image_token_index": 260,
        "image_grid_pinpoints": [[16, 16]],
    },
    "mistral3": {
        "text_config": MISTRAL,
        "vision_config": PIXTRAL,
        "image_token_index": 260,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
    },
    "smolvlm": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": TOWER,
        "image_token_id": 260,
    },
}
"""Models with a vision tower whose text model may be of any kind."""
FFN_LAYERS = {"nemotron_h": [1, 3, 4]}
"""Of a tiny model; by default all three."""
ENCODER_DECODERS = {
    "t5": {
        "vocab_size": 272,
        "d_model": 48,
        "d_ff": 192,
        "d_kv": 8,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "eos_token_id": 257,
        "decoder_start_token_id": 0,
    },
}
HEADS = {
    "eurobert": AutoModelForMaskedLM,
    "t5": AutoModelForSeq2SeqLM,
    "switch_transformers": AutoModelForSeq2SeqLM,
}
"""What loads a family, or its host, that AutoModelForCausalLM does not."""
PLAIN_SPLIT = {
    "experts": 8,
    "top_k": 2,
    "split": "coactivation",
    "compensate": "none",
    "sequential": False,
    "keep_dense": "none",
    "router_spread": 1e-4,
    "calibration": "builtin",
}
"""Of the default recipe's settings, those that make it an exact partition of the dense FFN, fitted
on the dense model, whose experts count the same: with all of them on it is the dense model. And the
calibration text is there, which by default the model first writes a part of. A test's own settings
override it."""


def once(make):
    """The function, called once for the same arguments; what it has made then is to be left as it
    is."""
    made, signature = {}, inspect.signature(make)

    def call(*args, **settings):
        bound = signature.bind(*args, **settings)
        bound.apply_defaults()
        key = json.dumps(bound.arguments, sort_keys=True, default=str)
        if key not in made:
            made[key] = make(*args, **settings)
        return made[key]

    return call


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_dense(folder: Path, family: str = "llama", *, dtype=torch.float32, shards=None, **fields):
    """Write a random model of the family, and a byte tokenizer, to the folder; returns it."""
    torch.manual_seed(0)
    own = ENCODER_DECODERS.get(family) or SIZES | FAMILIES.get(family, {})
    config = CONFIG_MAPPING[family](**(own | fields))
    model = HEADS.get(family, AutoModelForCausalLM).from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias", "sinks")):
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=shards or "5GB")
    make_tokenizer().save_pretrained(folder)
    return folder


def make_holder(folder: Path, name: str, *, dtype=torch.float32, **fields):
    """Write a random model with a vision tower, and a byte tokenizer, to the folder; returns it."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**deepcopy(HOLDERS[name]) | fields)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.get_decoder().parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer():
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def edited(source: Path, folder: Path, change):
    """Write the model with what `change` makes of its tensors to the folder; returns it."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return folder


def make_moved(folder: Path, base: Path, seed: int, scale: float = 0.05):
    """Write what a fine-tune of the base may be, all its weights moved a little; returns it."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    for file in sorted(folder.glob("*.safetensors")):
        moved = {
            name: (tensor.float() + scale * torch.randn(tensor.shape, generator=rng)).to(tensor)
            for name, tensor in load_file(file).items()
        }
        save_file(moved, file, {"format": "pt"})
    return folder


def make_lora(folder: Path, base: Path, targets: list[str], **settings):
    """Write an adapter of the base by peft, both factors non-zero; returns its folder."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(target_modules=targets, **settings))
    rng = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=rng) * 0.1)
    model.save_pretrained(folder)
    return folder
