"""Models with the switches of published ones: config.json as it is on the hub, with fewer and
smaller layers, so that no default of a tiny model hides what a real one does."""

import json

import pytest
import torch
from reference import TOLERANCE, dense_logits, gap, load, load_all_on, logits
from tiny import HEADS, make_tokenizer, once
from transformers import AutoConfig, AutoModelForCausalLM

import upcycle
from upcycle.core.errors import UpcycleError

LLAMA_LIKE = {"qwen2_moe", "glm4_moe", "granitemoeshared", "mixtral"}
LAYERS = 5
SMALLER = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
    "torch_dtype": "float32",
}
FULL, SLIDING = "full_attention", "sliding_attention"
LFM2 = {
    "model_type": "lfm2",
    "architectures": ["Lfm2ForCausalLM"],
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_mlp_init_scale": 1.0,
    "block_norm_eps": 1e-05,
    "block_out_init_scale": 1.0,
    "block_use_swiglu": True,
    "block_use_xavier_init": True,
    "conv_L_cache": 3,
    "conv_bias": False,
    "conv_use_xavier_init": True,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "use_cache": True,
    "use_pos_enc": True,
}
GRANITE4 = {
    "model_type": "granitemoehybrid",
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embedding_multiplier": 12,
    "hidden_act": "silu",
    "init_method": "mup",
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "max_position_embeddings": 32768,
    "normalization_function": "rmsnorm",
    "num_experts_per_tok": 0,
    "num_local_experts": 0,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": True,
    "use_cache": True,
}
PUBLISHED = {
    "SmolLM3-3B": {
        "model_type": "smollm3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "layer_types": [FULL] * 36,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_cache": False,
        "use_sliding_window": False,
    },
    "glm-4-9b-chat-hf": {
        "model_type": "glm",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1.5625e-07,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
    },
    "Seed-OSS-36B-Base": {
        "model_type": "seed_oss",
        "attention_bias": True,
        "attention_dropout": 0.1,
        "attention_out_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 524288,
        "mlp_bias": False,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "residual_dropout": 0.1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"rope_type": "default"},
        "rope_theta": 10000000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
    },
    "Ministral-8B-Instruct-2410": {
        "model_type": "mistral",
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "layer_types": [FULL, SLIDING, SLIDING, SLIDING] * 9,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "use_cache": True,
    },
    "cwm": {
        "model_type": "cwm",
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "layer_types": [FULL, SLIDING, SLIDING, SLIDING] * 16,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 1000000.0,
        "sliding_window": 8192,
        "tie_word_embeddings": False,
        "use_cache": True,
    },
    # The text model of Ministral-3-8B-Base-2512.
    "Ministral-3-8B": {
        "model_type": "ministral3",
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 262144,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384,
            "rope_theta": 1000000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
    },
    "helium-1-2b": {
        "model_type": "helium",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-8,
        "rope_theta": 20000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
    },
    "HyperCLOVAX-SEED-Think-14B": {
        "model_type": "hyperclovax",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_multiplier": 0.0078125,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "embedding_multiplier": 10.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "logits_scaling": 0.125,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "resid_pdrop": 0.0,
        "residual_multiplier": 1.0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 100000000,
        "tie_word_embeddings": False,
        "use_cache": False,
        "use_post_norm": True,
    },
    "EuroBERT-210m": {
        "model_type": "eurobert",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "EuroBERT/EuroBERT-210m--configuration_eurobert.EuroBertConfig"},
        "clf_pooling": "late",
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_dropout": 0.0,
        "mask_token": "<|mask|>",
        "mask_token_id": 128002,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 250000,
        "tie_word_embeddings": False,
        "use_cache": False,
    },
    "ERNIE-4.5-0.3B-PT": {
        "model_type": "ernie4_5",
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000,
        "tie_word_embeddings": True,
        "use_bias": False,
        "use_cache": False,
    },
    "Youtu-LLM-2B": {
        "model_type": "youtu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "kv_lora_rank": 512,
        "max_position_embeddings": 131072,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 1536,
        "qk_head_dim": 192,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_interleave": True,
        "rope_scaling": None,
        "rope_theta": 1600000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "v_head_dim": 128,
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
    },
    "LFM2-350M": LFM2,
    "LFM2-1.2B": LFM2,
    "granite-4.0-350m": GRANITE4
    | {
        "attention_multiplier": 0.015625,
        "logits_scaling": 4,
        "position_embedding_type": "rope",
        "residual_multiplier": 0.246,
    },
    "granite-4.0-h-350m": GRANITE4
    | {
        "attention_multiplier": 0.015625,
        "logits_scaling": 4,
        "position_embedding_type": "nope",
        "residual_multiplier": 0.246,
    },
    "granite-4.0-h-1b": GRANITE4
    | {
        "attention_multiplier": 0.0078125,
        "logits_scaling": 6,
        "position_embedding_type": "nope",
        "residual_multiplier": 0.22,
    },
    "AFM-4.5B": {
        "model_type": "arcee",
        "architectures": ["ArceeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "relu2",
        "max_position_embeddings": 65536,
        "mlp_bias": False,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 20.0,
            "mscale": 1.0,
            "original_max_position_embeddings": 32,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
    },
    "NVIDIA-Nemotron-Nano-9B-v2": {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "conv_kernel": 4,
        "expand": 2,
        "hidden_dropout": 0.0,
        "layer_norm_epsilon": 1e-05,
        "mamba_hidden_act": "silu",
        "mamba_proj_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "mlp_hidden_act": "relu2",
        "num_logits_to_keep": 1,
        "rescale_prenorm_residual": True,
        "residual_in_fp32": False,
        "rms_norm_eps": 1e-05,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "time_step_floor": 0.0001,
        "time_step_limit": [0.0, float("inf")],
        "time_step_max": 0.1,
        "time_step_min": 0.001,
        "time_step_rank": 256,
        "use_bias": False,
        "use_cache": True,
        "use_conv_bias": True,
        "use_mamba_kernels": True,
    },
}
OWN_SIZES = {
    "LFM2-350M": {
        "block_dim": 32,
        "block_ff_dim": 280,
        "block_multiple_of": 16,
        "conv_dim": 32,
        "conv_dim_out": 32,
        "full_attn_idxs": [2],
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
    },
    "LFM2-1.2B": {
        "block_dim": 64,
        "block_ff_dim": 288,
        "block_multiple_of": 16,
        "conv_dim": 64,
        "conv_dim_out": 64,
        "full_attn_idxs": [1],
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_heads": 8,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
    },
    "granite-4.0-350m": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "layer_types": ["attention", "attention", "attention"],
        "mamba_chunk_size": 16,
        "mamba_d_head": "auto",
        "mamba_d_state": 16,
        "mamba_n_heads": 8,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "shared_intermediate_size": 192,
    },
    "granite-4.0-h-350m": {
        "hidden_size": 48,
        "intermediate_size": 192,
        "layer_types": ["mamba", "mamba", "attention"],
        "mamba_chunk_size": 16,
        "mamba_d_head": 24,
        "mamba_d_state": 16,
        "mamba_n_heads": 4,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "shared_intermediate_size": 192,
    },
    "granite-4.0-h-1b": {
        "hidden_size": 48,
        "intermediate_size": 192,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_chunk_size": 16,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_heads": 6,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "shared_intermediate_size": 192,
    },
    "AFM-4.5B": {
        "head_dim": 16,
        "hidden_size": 80,
        "intermediate_size": 192,
        "num_attention_heads": 5,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
    },
    "NVIDIA-Nemotron-Nano-9B-v2": {
        "chunk_size": 128,
        "head_dim": 16,
        "hidden_size": 56,
        "hybrid_override_pattern": "M-*-M-",
        "intermediate_size": 192,
        "mamba_head_dim": 10,
        "mamba_num_heads": 8,
        "n_groups": 4,
        "num_attention_heads": 5,
        "num_hidden_layers": 6,
        "num_key_value_heads": 1,
        "ssm_state_size": 16,
    },
}
"""Of models with sizes that others have not; each comes to an FFN of 192 neurons."""
HOSTED = {
    "EuroBERT-210m": LLAMA_LIKE,
    "ERNIE-4.5-0.3B-PT": {"ernie4_5_moe"},
    "Youtu-LLM-2B": {"deepseek_v3"},
    "Qwen3-0.6B": {"qwen3_moe", "glm4_moe", "laguna"},
    "SmolLM3-3B": {"granitemoe_swa"},
    "glm-4-9b-chat-hf": {"glm4_moe"},
    "Seed-OSS-36B-Base": {"qwen2_moe", "glm4_moe", "granitemoeshared"},
    "Ministral-8B-Instruct-2410": {"qwen2_moe", "granitemoe_swa"},
    "cwm": {"qwen2_moe", "granitemoe_swa"},
    "helium-1-2b": LLAMA_LIKE,
    "LFM2-350M": {"lfm2_moe"},
    "LFM2-1.2B": {"lfm2_moe"},
    "granite-4.0-350m": {"granitemoehybrid"},
    "granite-4.0-h-350m": {"granitemoehybrid"},
    "granite-4.0-h-1b": {"granitemoehybrid"},
    "AFM-4.5B": LLAMA_LIKE,
    "NVIDIA-Nemotron-Nano-9B-v2": {"nemotron_h"},
}
CHANGED = {
    "Ministral-3-8B": ({"max_position_embeddings": 16384}, "queries scaled", LLAMA_LIKE),
    "HyperCLOVAX-SEED-Think-14B": (
        {"use_post_norm": False},
        "norms before and after",
        {"granitemoeshared"},
    ),
}
SPLIT = {"experts": 8, "top_k": 3, "shared": 0}
COPY = {"method": "copy", "experts": 4, "top_k": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Writes a random model with a published one's switches, once per name and changes."""

    @once
    def make(name, **changed):
        return write(tmp_path_factory.mktemp("published"), name, changed)

    return make


def write(folder, name, changed):
    published = PUBLISHED[name] | changed
    sizes = SMALLER | OWN_SIZES[name] if name in OWN_SIZES else smaller(published)
    config = json.dumps(published | sizes)
    (folder / "config.json").write_text(config)
    torch.manual_seed(0)
    auto = HEADS.get(published["model_type"], AutoModelForCausalLM)
    model = auto.from_config(AutoConfig.from_pretrained(folder))
    for place, parameter in model.named_parameters():
        if place.endswith(("norm.weight", "bias")):
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    # transformers spells the config anew; people have it as it was published.
    (folder / "config.json").write_text(config)
    return folder


def smaller(published):
    """Its sizes: 2 queries to a key, or 4 where it has more than that."""
    fields = {**SMALLER, "num_attention_heads": 4, "num_key_value_heads": 2}
    if published["num_attention_heads"] // published["num_key_value_heads"] > 4:
        fields["num_key_value_heads"] = 1
    if "kv_lora_rank" in published:
        fields |= {"num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 24}
    if "head_dim" in published:
        fields["head_dim"] = 16
    for name in ("layer_types", "no_rope_layers"):
        if name in published:
            fields[name] = published[name][:LAYERS]
    if published.get("sliding_window"):
        fields["sliding_window"] = 16
    return fields


def reached(source):
    return {name for name, why in upcycle.plan(str(source), **COPY).targets.items() if not why}


@pytest.mark.parametrize("name", HOSTED)
def test_as_it_is_published(small, moe, name):
    source = small(name)
    assert reached(source) == HOSTED[name]
    assert_exact(moe, source, HOSTED[name])


@pytest.mark.parametrize("name", CHANGED)
def test_refused_as_it_is_published_and_hosted_with_another_switch(small, moe, name):
    changed, why, hosts = CHANGED[name]
    with pytest.raises(UpcycleError, match=why):
        upcycle.plan(str(small(name)))
    source = small(name, **changed)
    assert reached(source) == hosts
    assert_exact(moe, source, hosts)


def assert_exact(moe, source, hosts):
    for target in hosts:
        copied, split = (moe(source, target=target, **way) for way in (COPY, SPLIT))
        assert gap(logits(load(copied)), dense_logits(source)) < TOLERANCE["mean"], target
        assert gap(logits(load_all_on(split)), dense_logits(source)) < TOLERANCE["sum"], target


def test_every_published_model_is_tested():
    assert HOSTED.keys() | CHANGED.keys() == PUBLISHED.keys()
