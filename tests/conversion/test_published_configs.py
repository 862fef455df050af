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
PUBLISHED = {name: LFM2 | sizes for name, sizes in SIZES.items()}
TARGET = {"lfm2": "lfm2_moe"}
WIDTH = {"LFM2-350M": 144, "LFM2-1.2B": 256}
"""Of 208 and 384 neurons, two thirds, up to the next multiple of 16."""


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
    out = moe(published(name), method="copy", experts=4, top_k=2)
    assert read_json(out / "config.json")["model_type"] == TARGET[PUBLISHED[name]["model_type"]]
    assert gap(logits(load(out)), dense_logits(published(name))) < TOLERANCE["mean"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_experts_on_are_the_dense_model(published, moe, name):
    assert upcycle.plan(str(published(name))).source.arch.intermediate_size == WIDTH[name]
    out = moe(published(name), experts=WIDTH[name] // 16, top_k=3)
    assert gap(logits(load_all_on(out)), dense_logits(published(name))) < TOLERANCE["sum"]
