"""Models of the configs that their makers publish, with fewer layers, channels and words: every
switch stands as published, so that no default of a tiny config hides what it does."""

import json

import pytest
from reference import TOLERANCE, dense_logits, gap, load, load_all_on, logits, read_json
from tiny import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

PUBLISHED = {
    "baidu/ERNIE-4.5-0.3B-PT": {
        "architectures": ["Ernie4_5_ForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 131072,
        "model_type": "ernie4_5",
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "num_hidden_layers": 18,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "use_cache": False,
        "vocab_size": 103424,
        "rope_theta": 500000,
        "use_bias": False,
        "tie_word_embeddings": True,
    },
    "tencent/Youtu-LLM-2B": {
        "architectures": ["YoutuForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "kv_lora_rank": 512,
        "max_position_embeddings": 131072,
        "model_type": "youtu",
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
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
        "vocab_size": 128256,
    },
    "Qwen/Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
SMALLER = {
    **{"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 192, "vocab_size": 272},
    **{"bos_token_id": 256, "eos_token_id": 257, "initializer_range": 0.1},
}
RANKS = {"youtu": {"q_lora_rank": 48, "kv_lora_rank": 24}}
HOSTS = {"ernie4_5": "ernie4_5_moe", "youtu": "deepseek_v3", "qwen3": "laguna"}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory):
    """A random model of a published config, as config.json spells it, made smaller."""
    folder = tmp_path_factory.mktemp("published")
    fields = PUBLISHED[request.param] | SMALLER
    fields |= RANKS.get(fields["model_type"], {})
    (folder / "config.json").write_text(json.dumps(fields))
    config = AutoConfig.from_pretrained(folder)
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_split_with_all_experts_on_is_the_dense_model(published, moe):
    target = HOSTS[read_json(published / "config.json")["model_type"]]
    settings = {"experts": 8, "top_k": 3, "shared": 0.25, "keep_dense": "0"}
    out = moe(published, target=target, **settings)
    assert gap(logits(load_all_on(out)), dense_logits(published)) < TOLERANCE["sum"]


def test_copies_are_the_dense_model(published, moe):
    target = HOSTS[read_json(published / "config.json")["model_type"]]
    out = moe(published, target=target, method="copy", experts=4, top_k=2)
    assert gap(logits(load(out)), dense_logits(published)) < TOLERANCE["mean"]
