"""Models with the config.json of published ones, but for their sizes: copies and, with all experts
on, splits are the dense model, so that no switch of a real model is one that tiny configs hide."""

import pytest
from reference import TOLERANCE, dense_logits, gap, load, load_all_on, logits, read_json
from tiny import make_published

import upcycle

LFM2 = {
    "architectures": ["Lfm2ForCausalLM"],
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_mlp_init_scale": 1.0,
    "block_multiple_of": 16,
    "block_norm_eps": 1e-05,
    "block_out_init_scale": 1.0,
    "block_use_swiglu": True,
    "block_use_xavier_init": True,
    "bos_token_id": 1,
    "conv_L_cache": 3,
    "conv_bias": False,
    "conv_use_xavier_init": True,
    "eos_token_id": 7,
    "initializer_range": 0.02,
    "max_position_embeddings": 128000,
    "model_type": "lfm2",
    "norm_eps": 1e-05,
    "pad_token_id": 0,
    "rope_theta": 1000000.0,
    "use_cache": True,
    "use_pos_enc": True,
    "vocab_size": 272,
}
GRANITE4 = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 100257,
    "embedding_multiplier": 12,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "init_method": "mup",
    "initializer_range": 0.1,
    "logits_scaling": 4,
    "mamba_chunk_size": 16,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_proj_bias": False,
    "max_position_embeddings": 32768,
    "model_type": "granitemoehybrid",
    "normalization_function": "rmsnorm",
    "num_experts_per_tok": 0,
    "num_local_experts": 0,
    "output_router_logits": False,
    "pad_token_id": 271,
    "residual_multiplier": 0.246,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 272,
}
SIZES = {
    "LFM2-350M": {
        "block_dim": 32,
        "block_ff_dim": 208,
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
        "block_ff_dim": 384,
        "conv_dim": 64,
        "conv_dim_out": 64,
        "full_attn_idxs": [1],
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_heads": 8,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
    },
}
GRANITE4_SIZES = {
    "granite-4.0-350m": {
        "attention_multiplier": 0.015625,
        "hidden_size": 64,
        "intermediate_size": 128,
        "layer_types": ["attention"] * 3,
        "mamba_d_head": "auto",
        "mamba_n_heads": 8,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "position_embedding_type": "rope",
        "shared_intermediate_size": 128,
    },
    "granite-4.0-h-350m": {
        "attention_multiplier": 0.015625,
        "hidden_size": 48,
        "intermediate_size": 128,
        "layer_types": ["mamba", "mamba", "attention"],
        "mamba_d_head": 24,
        "mamba_n_heads": 4,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "position_embedding_type": "nope",
        "shared_intermediate_size": 128,
    },
    "granite-4.0-h-1b": {
        "attention_multiplier": 0.0078125,
        "hidden_size": 48,
        "intermediate_size": 256,
        "layer_types": ["mamba", "attention", "mamba"],
        "logits_scaling": 6,
        "mamba_d_head": 16,
        "mamba_n_heads": 6,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "position_embedding_type": "nope",
        "residual_multiplier": 0.22,
        "shared_intermediate_size": 256,
    },
}
NEMOTRON = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 12,
    "expand": 2,
    "head_dim": 16,
    "hidden_dropout": 0.0,
    "hidden_size": 56,
    "hybrid_override_pattern": "M-*-M-",
    "initializer_range": 0.02,
    "intermediate_size": 192,
    "layer_norm_epsilon": 1e-05,
    "mamba_head_dim": 10,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 8,
    "mamba_proj_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "n_groups": 4,
    "num_attention_heads": 5,
    "num_hidden_layers": 6,
    "num_key_value_heads": 1,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rms_norm_eps": 1e-05,
    "sliding_window": None,
    "ssm_state_size": 16,
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
    "vocab_size": 272,
}
AFM = {
    "architectures": ["ArceeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 16,
    "hidden_act": "relu2",
    "hidden_size": 80,
    "initializer_range": 0.02,
    "intermediate_size": 192,
    "max_position_embeddings": 65536,
    "mlp_bias": False,
    "model_type": "arcee",
    "num_attention_heads": 5,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
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
    "vocab_size": 272,
}
PUBLISHED = {name: LFM2 | sizes for name, sizes in SIZES.items()}
PUBLISHED |= {name: GRANITE4 | sizes for name, sizes in GRANITE4_SIZES.items()}
PUBLISHED["AFM-4.5B"] = AFM
PUBLISHED["NVIDIA-Nemotron-Nano-9B-v2"] = NEMOTRON
TARGET = {"arcee": "mixtral", "lfm2": "lfm2_moe"}
WIDTH = {
    # Of 208 and 384 neurons, two thirds, up to the next multiple of 16.
    "LFM2-350M": 144,
    "LFM2-1.2B": 256,
    "granite-4.0-350m": 128,
    "granite-4.0-h-350m": 128,
    "granite-4.0-h-1b": 256,
    "NVIDIA-Nemotron-Nano-9B-v2": 192,
    "AFM-4.5B": 192,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Makes a model, once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = make_published(tmp_path_factory.mktemp(name), PUBLISHED[name])
        return made[name]

    return make


@pytest.mark.parametrize("name", PUBLISHED)
def test_copies_are_the_dense_model(published, moe, name):
    family = PUBLISHED[name]["model_type"]
    target = TARGET.get(family, family)
    out = moe(published(name), method="copy", experts=4, top_k=2)
    assert read_json(out / "config.json")["model_type"] == target
    assert gap(logits(load(out)), dense_logits(published(name))) < TOLERANCE["mean"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_experts_on_are_the_dense_model(published, moe, name):
    assert upcycle.plan(str(published(name))).source.arch.intermediate_size == WIDTH[name]
    out = moe(published(name), experts=WIDTH[name] // 16, top_k=3)
    assert gap(logits(load_all_on(out)), dense_logits(published(name))) < TOLERANCE["sum"]
