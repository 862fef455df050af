"""Every dense family on every target that hosts it: the converted model computes what it must."""

import math
import shutil

import pytest
import torch
from hosting import DECODER_TARGETS as TARGETS
from hosting import hosts
from reference import (
    ALWAYS_RENORMALISES,
    MUTATED,
    NOISE,
    TOKENS,
    TOLERANCE,
    dense_logits,
    experts,
    gap,
    load,
    load_all_on,
    logits,
    moe_layers,
    naive_sum,
    noise,
    read_json,
    routers,
    top_k,
    weights,
)
from tiny import FAMILIES, FFN_LAYERS, SIZES, edited
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import upcycle
from upcycle.core.errors import UpcycleError

LLAMA_LIKE = {"qwen2_moe", "glm4_moe", "granitemoeshared", "mixtral"}
HOSTS = {
    "arcee": LLAMA_LIKE,
    "llama": LLAMA_LIKE,
    "mistral": {"qwen2_moe", "mixtral"},
    "qwen2": {"qwen2_moe", "glm4_moe", "granitemoeshared"},
    "qwen3": {"qwen3_moe", "glm4_moe", "laguna"},
    "phi3": {"qwen2_moe", "mixtral"},
    "gemma": {"granitemoeshared"},
    "granite": {"granitemoeshared"},
    "olmo2": {"flex_olmo"},
    "ministral": {"qwen2_moe", "granitemoe_swa"},
    "cwm": {"qwen2_moe", "granitemoe_swa"},
    "ministral3": LLAMA_LIKE,
    "seed_oss": {"qwen2_moe", "glm4_moe", "granitemoeshared"},
    "glm": {"glm4_moe"},
    "helium": LLAMA_LIKE,
    "hyperclovax": {"granitemoeshared"},
    "smollm3": {"granitemoe_swa"},
    "granite_swa": {"granitemoe_swa"},
    "eurobert": LLAMA_LIKE,
    "ernie4_5": {"ernie4_5_moe"},
    "youtu": {"deepseek_v3"},
    "qwen3_5_text": {"qwen3_5_moe"},
    "gemma4_text": {"gemma4"},
    "lfm2": {"lfm2_moe"},
    "granitemoehybrid": {"granitemoehybrid"},
    "nemotron_h": {"nemotron_h"},
}
ENCODERS = {"eurobert"}
SHARED = {
    "qwen2_moe", "glm4_moe", "granitemoeshared", "granitemoe_swa", "ernie4_5_moe", "laguna",
    "deepseek_v3", "qwen3_5_moe", "granitemoehybrid", "nemotron_h",
}  # fmt: skip
TOP_K_IS_FIXED = ALWAYS_RENORMALISES | {"qwen3_moe", "lfm2_moe"}
KEEPS_ANY_DENSE = {"qwen2_moe", "qwen3_moe", "laguna", "nemotron_h"}
SPLIT = {"experts": 8, "top_k": 3}
COPY = {"method": "copy", "experts": 4, "top_k": 2}
PRUNE = {"method": "prune", "experts": 4, "top_k": 1, "router": "kmeans"}


PAIRS = [(family, target) for family in sorted(FAMILIES) for target in sorted(hosts(family))]
# Of experts whose gate is their up, many a mistake would not show.
UNLIKE_OTHERS = ENCODERS | {"arcee"}
FAMILY_OF = {t: family for family, t in reversed(PAIRS) if family not in UNLIKE_OTHERS}
LOW_PRECISION = [torch.bfloat16, torch.float16]


NEVER_TIED = {"nemotron_h"}
"""Families whose class ties no embeddings."""


pairs = pytest.mark.parametrize(("family", "target"), PAIRS)
shared_pairs = pytest.mark.parametrize(
    ("family", "target", "shared"),
    [(f, t, s) for f, t in PAIRS for s in ((0, 0.25) if t in SHARED else (0,))],
)
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
targets = pytest.mark.parametrize("target", sorted(TARGETS))


def test_each_family_has_its_hosts():
    assert {family: hosts(family) for family in FAMILIES} == HOSTS


@pytest.mark.parametrize(
    ("family", "target"), [pair for pair in PAIRS if pair[0] not in ("mistral", "qwen2", "phi3")]
)
@pytest.mark.parametrize("settings", [{}, {"shared": 0}, {"method": "copy"}], ids=str)
def test_config_says_the_experts_that_were_asked_for(dense, moe, family, target, settings):
    out = moe(dense(family), target=target, **{"experts": 8, "top_k": 2} | settings)
    config = read_json(out / "config.json")
    counts = [config[key] for key in NUM_EXPERTS if key in config]
    assert set(counts) == {8}
    assert top_k(config) == 2
    assert [len(each.down_proj) for each in experts(load(out))] == [8] * 3


class TestSplit:
    @shared_pairs
    def test_all_experts_on_is_the_dense_model(self, dense, moe, family, target, shared):
        out = moe(dense(family), target=target, shared=shared, **SPLIT)
        assert gap(logits(load_all_on(out)), dense_logits(dense(family))) < TOLERANCE["sum"]

    @shared_pairs
    def test_is_the_plain_sum_of_the_selected_experts(self, dense, moe, family, target, shared):
        out = moe(dense(family), target=target, shared=shared, **SPLIT)
        assert gap(*naive_sum(dense(family), out)) < TOLERANCE["sum"]

    @shared_pairs
    @pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
    def test_below_float32_the_gap_is_rounding(self, dense, moe, family, target, shared, dtype):
        source = dense(family, dtype=dtype)
        out = moe(source, target=target, shared=shared, **SPLIT)
        limit = NOISE * noise(source, dtype)
        assert gap(logits(load_all_on(out, dtype)), dense_logits(source, dtype)) < limit
        assert gap(*naive_sum(source, out, dtype)) < limit

    @pairs
    def test_partition_holds_each_neuron_once(self, dense, moe, family, target):
        for layer in moe_layers(moe(dense(family), target=target, shared=0, **SPLIT)):
            assert sorted(layer["permutation"]) == list(range(SIZES["intermediate_size"]))

    @pairs
    def test_neuron_counts_for_each_expert_that_holds_it(self, dense, moe, family, target):
        out = moe(dense(family), target=target, shared=0, split="sharing_inner", **SPLIT)
        for layer in moe_layers(out):
            assert len(set(layer["permutation"])) < SIZES["intermediate_size"]
        assert gap(*naive_sum(dense(family), out)) < TOLERANCE["sum"]

    @pairs
    def test_pruned_copy_is_the_sum_of_its_neurons(self, dense, moe, family, target):
        out = moe(dense(family), target=target, **PRUNE)
        assert gap(*naive_sum(dense(family), out)) < TOLERANCE["sum"]

    @pytest.mark.parametrize("top_k", [1, 6])
    @pytest.mark.parametrize("target", sorted(set(TARGETS) - TOP_K_IS_FIXED))
    def test_top_k_may_change_later(self, dense, moe, target, top_k):
        source = dense(FAMILY_OF[target])
        out = moe(source, target=target, shared=0, **SPLIT)
        assert gap(*naive_sum(source, out, num_experts_per_tok=top_k)) < TOLERANCE["sum"]


class TestCopy:
    @pairs
    def test_is_the_dense_model(self, dense, moe, family, target):
        out = moe(dense(family), target=target, **COPY)
        assert gap(logits(load(out)), dense_logits(dense(family))) < TOLERANCE["mean"]

    @pairs
    @pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
    def test_below_float32_the_gap_is_rounding(self, dense, moe, family, target, dtype):
        source = dense(family, dtype=dtype)
        out = moe(source, target=target, **COPY)
        limit = NOISE * noise(source, dtype)
        assert gap(logits(load(out, dtype)), dense_logits(source, dtype)) < limit

    @pytest.mark.parametrize(("family", "target"), [p for p in PAIRS if p[0] not in ENCODERS])
    def test_writes_the_dense_models_text(self, dense, moe, family, target):
        models = load(dense(family)), load(moe(dense(family), target=target, **COPY))
        settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
        expected, actual = (m.generate(TOKENS[:, :20], **settings) for m in models)
        assert torch.equal(actual, expected)

    @targets
    @pytest.mark.parametrize("stored", ["bfloat16", "float16"])
    def test_stored_in_another_dtype_is_the_dense_model_in_it(self, dense, moe, target, stored):
        source, dtype = dense(FAMILY_OF[target]), getattr(torch, stored)
        out = moe(source, target=target, dtype=stored, **COPY)
        assert read_json(out / "config.json")["dtype"] == stored
        limit = NOISE * noise(source, dtype)
        assert gap(logits(load(out, dtype)), dense_logits(source, dtype)) < limit

    @pytest.mark.parametrize("target", ["qwen2_moe", "glm4_moe"])
    def test_of_top_1_is_the_dense_model(self, dense, moe, target):
        out = moe(dense(), target=target, method="copy", experts=4, top_k=1)
        assert gap(logits(load(out)), dense_logits(dense())) < TOLERANCE["sum"]

    @pytest.mark.parametrize("target", sorted(ALWAYS_RENORMALISES))
    def test_of_top_1_is_refused_where_its_router_would_be_frozen(self, dense, target):
        source = str(dense(FAMILY_OF[target]))
        request = {"method": "copy", "experts": 4, "top_k": 1, "target": target}
        with pytest.raises(UpcycleError, match="no gradient"):
            upcycle.plan(source, **request)
        assert upcycle.plan(source, allow_frozen_router=True, **request).design.combine == "mean"

    @pytest.mark.parametrize("target", sorted(set(TARGETS) - {"flex_olmo", "qwen3_moe"}))
    @pytest.mark.parametrize(
        ("copies", "granularity", "top_k"), [(2, 2, 2), (2, 2, 4), (4, 2, 4), (4, 3, 6)]
    )
    def test_granular_copies_are_averaged(self, dense, moe, target, copies, granularity, top_k):
        grid = {"experts": copies, "granularity": granularity, "top_k": top_k}
        source = dense(FAMILY_OF[target])
        out = moe(source, method="copy", target=target, **grid)
        assert gap(logits(load(out)), dense_logits(source)) < TOLERANCE["mean"]

    def test_router_is_not_tempered(self, dense, moe):
        rows = weights(moe(dense(), target="mixtral", **COPY))
        name = "model.layers.0.block_sparse_moe.gate.weight"
        assert rows[name].std() == pytest.approx(0.02, rel=0.2)


class TestFiles:
    @pairs
    def test_saved_by_transformers_it_is_the_same_model(self, dense, moe, tmp_path, family, target):
        model = load(moe(dense(family), target=target, shared=0, **SPLIT))
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(load(tmp_path)), logits(model))

    @pairs
    def test_names_are_those_that_transformers_saves(self, dense, moe, tmp_path, family, target):
        out = moe(dense(family), target=target, shared=0, **SPLIT)
        load(out).save_pretrained(tmp_path)
        assert set(weights(out)) == set(weights(tmp_path))

    @pytest.mark.parametrize(("family", "target"), [p for p in PAIRS if p[0] not in NEVER_TIED])
    def test_tied_embeddings_stay_tied(self, dense, moe, family, target):
        source = dense(family, tie_word_embeddings=True)
        out = moe(source, target=target, **COPY)
        assert "lm_head.weight" not in weights(out)
        model = load(out)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert gap(logits(model), dense_logits(source)) < TOLERANCE["mean"]

    def test_head_of_its_own_is_kept(self, dense, moe):
        source = dense("gemma", tie_word_embeddings=False)
        out = moe(source, **COPY)
        assert "lm_head.weight" in weights(out)
        assert gap(logits(load(out)), dense_logits(source)) < TOLERANCE["mean"]

    @pytest.mark.parametrize("settings", [SPLIT, COPY], ids=["split", "copy"])
    def test_sharded_source_gives_the_same_tensors(self, dense, moe, settings):
        sharded = dense(shards="50KB")
        assert len(list(sharded.glob("*.safetensors"))) > 2
        whole, from_shards = (weights(moe(source, **settings)) for source in (dense(), sharded))
        assert set(whole) == set(from_shards)
        assert all(torch.equal(whole[name], from_shards[name]) for name in whole)

    def test_sharded_source_gives_the_same_bytes(self, dense, moe):
        whole, from_shards = (moe(dense(shards=size), **COPY) for size in (None, "50KB"))
        name = "model.safetensors"
        assert (whole / name).read_bytes() == (from_shards / name).read_bytes()

    @targets
    def test_sharded_output_is_the_same_model(self, dense, moe, target):
        settings = {"target": target, "shared": 0, **SPLIT}
        source = dense(FAMILY_OF[target])
        out = moe(source, max_shard_size="50KB", **settings)
        assert len(list(out.glob("*.safetensors"))) > 2
        assert torch.equal(logits(load(out)), logits(load(moe(source, **settings))))

    def test_source_of_two_dtypes_is_converted(self, dense, moe, tmp_path):
        source = dense(dtype=torch.bfloat16)
        store_norms_in_float32(source, tmp_path)
        assert gap(logits(load(moe(tmp_path, **COPY))), dense_logits(source)) < TOLERANCE["mean"]


class TestLayersKeptDense:
    @pytest.mark.parametrize("target", sorted(KEEPS_ANY_DENSE))
    def test_any_layer_where_the_target_can(self, dense, moe, target):
        source = dense(FAMILY_OF[target])
        first, second, third = FFN_LAYERS.get(FAMILY_OF[target], range(3))
        out = moe(source, target=target, keep_dense=f"{first},{third}", shared=0, **SPLIT)
        assert [layer["layer"] for layer in moe_layers(out)] == [second]
        assert gap(logits(load_all_on(out)), dense_logits(source)) < TOLERANCE["sum"]
        assert gap(*naive_sum(source, out)) < TOLERANCE["sum"]

    @pytest.mark.parametrize("kept", ["0", "0,1"])
    @pytest.mark.parametrize("target", ["glm4_moe", "deepseek_v3", "ernie4_5_moe"])
    def test_first_layers(self, dense, moe, target, kept):
        source = dense(FAMILY_OF[target])
        out = moe(source, target=target, keep_dense=kept, shared=0.25, **SPLIT)
        assert len(moe_layers(out)) == 3 - len(kept.split(","))
        assert gap(logits(load_all_on(out)), dense_logits(source)) < TOLERANCE["sum"]
        assert gap(*naive_sum(source, out)) < TOLERANCE["sum"]

    @pytest.mark.parametrize(
        ("kept", "routed"), [("0,2,4", [1, 3]), ("0,4", [1, 2, 3]), ("4", [0, 1, 2, 3])]
    )
    def test_first_and_last_layers_and_each_second_on_ernie4_5_moe(self, dense, moe, kept, routed):
        source = dense("ernie4_5", num_hidden_layers=5)
        out = moe(source, keep_dense=kept, shared=0.25, **SPLIT)
        assert [layer["layer"] for layer in moe_layers(out)] == routed
        assert gap(logits(load_all_on(out)), dense_logits(source)) < TOLERANCE["sum"]
        assert gap(*naive_sum(source, out)) < TOLERANCE["sum"]

    @pytest.mark.parametrize("target", sorted(set(TARGETS) - KEEPS_ANY_DENSE))
    def test_is_refused_where_the_target_can_not(self, dense, target):
        source = str(dense(FAMILY_OF[target]))
        with pytest.raises(UpcycleError, match=rf"{target} can.*`keep_dense"):
            upcycle.plan(source, target=target, keep_dense="1", **SPLIT)

    def test_every_second_on_ernie4_5_moe_counts_from_the_first(self, dense):
        source = str(dense("ernie4_5", num_hidden_layers=5))
        with pytest.raises(UpcycleError, match="only the first and the last"):
            upcycle.plan(source, keep_dense="1,3", **SPLIT)

    def test_of_a_model_without_gates(self, dense, moe):
        source = dense("arcee")
        out = moe(source, target="qwen2_moe", keep_dense="0,2", shared=0.25, **SPLIT)
        assert gap(logits(load_all_on(out)), dense_logits(source)) < TOLERANCE["sum"]
        assert gap(*naive_sum(source, out)) < TOLERANCE["sum"]

    def test_of_copies(self, dense, moe):
        out = moe(dense(), target="qwen2_moe", keep_dense="1", **COPY)
        assert gap(logits(load(out)), dense_logits(dense())) < TOLERANCE["mean"]


ROPE = {"rope_theta": 5e3}
SCALED_ROPE = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
# Without these fields transformers can't run the model.
ROPE_OF = {
    "ministral3": {"llama_4_scaling_beta": 0.0, "original_max_position_embeddings": 32},
    "glm": {"partial_rotary_factor": 0.5},
}
TWO_OF_FOUR = {"method": "copy", "experts": 4, "top_k": 2}


class TestPositions:
    """On 40 tokens, which is beyond the original length of each scaled rope."""

    @pytest.mark.parametrize("kind", sorted(SCALED_ROPE))
    @pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"phi3", "gemma4_text"}))
    def test_scaled_rope_is_kept(self, dense, moe, family, kind):
        rope = ROPE_OF.get(family, {}) | {"rope_type": kind, **ROPE, **SCALED_ROPE[kind]}
        length = {"max_position_embeddings": 32} if kind == "dynamic" else {}
        reached = exact_hosts(dense, moe, family, rope_parameters=rope, **length)
        assert reached == HOSTS[family]

    @pytest.mark.parametrize(("rotary", "expected"), [(1.0, LLAMA_LIKE), (0.5, {"glm4_moe"})])
    def test_long_rope_of_phi3_is_kept(self, dense, moe, rotary, expected):
        reached = exact_hosts(dense, moe, "phi3", sliding_window=None, **long_rope(rotary))
        assert reached == expected

    def test_partial_rotary_goes_to_glm4_moe(self, dense, moe):
        rope = {"rope_type": "default", **ROPE, "partial_rotary_factor": 0.5}
        reached = exact_hosts(dense, moe, "phi3", sliding_window=None, rope_parameters=rope)
        assert reached == {"glm4_moe"}

    @pytest.mark.parametrize("kind", [None, *sorted(SCALED_ROPE)])
    @pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "glm4_moe", "granitemoeshared"])
    def test_the_fields_of_transformers_4_are_there_too(self, dense, moe, target, kind):
        """It reads `rope_theta` and `rope_scaling`, and takes a default where they are missing."""
        scaling = {"rope_type": kind, **SCALED_ROPE[kind]} if kind else {"rope_type": "default"}
        source = dense(rope_parameters=scaling | {"rope_theta": 300.0})
        config = read_json(moe(source, target=target, **TWO_OF_FOUR) / "config.json")
        assert config["rope_theta"] == 300.0
        assert config["rope_scaling"] == (scaling if kind else None)
        assert config.get("partial_rotary_factor", 1.0) == 1.0
        assert ("partial_rotary_factor" in config) == (target == "glm4_moe")  # 0.5 by default

    @pytest.mark.parametrize("given", [{}, {"factor": 3.0}, {"attention_factor": 1.3}])
    def test_long_rope_is_what_transformers_4_computes(self, dense, moe, given):
        """It wants the original length at the top, and looks at no factor but its share in the
        longest."""
        rope = long_rope(1.0)["rope_parameters"] | {"original_max_position_embeddings": 32} | given
        source = dense(rope_parameters=rope)
        config = read_json(moe(source, target="mixtral", **TWO_OF_FOUR) / "config.json")
        scaling, original = config["rope_scaling"], config["original_max_position_embeddings"]
        assert original == 32
        assert scaling["long_factor"] == rope["long_factor"]
        share = config["max_position_embeddings"] / original
        by_share = math.sqrt(1 + math.log(share) / math.log(original))
        rotary = AutoModelForCausalLM.from_pretrained(source).model.rotary_emb
        found = scaling.get("attention_factor") or by_share
        assert found == pytest.approx(rotary.attention_scaling)


def test_experts_of_qwen3_5_are_one_tensor_which_mlx_wants(dense, moe):
    written = weights(moe(dense("qwen3_5_text"), **TWO_OF_FOUR))
    hidden, size = SIZES["hidden_size"], SIZES["intermediate_size"]
    assert written["model.layers.1.mlp.experts.gate_up_proj"].shape == (4, 2 * size, hidden)
    assert written["model.layers.1.mlp.experts.down_proj"].shape == (4, hidden, size)
    assert not any(".experts.0." in name for name in written)


def test_the_activation_of_nemotrons_ffns_is_not_taken_for_that_of_its_mamba_layers(dense, moe):
    config = read_json(moe(dense("nemotron_h"), **TWO_OF_FOUR) / "config.json")
    assert config["mlp_hidden_act"] == "relu2"
    assert config["hidden_act"] is None


def test_layers_without_rotary_embedding_are_listed_as_llama_cpp_reads_them(dense, moe):
    config = read_json(moe(dense("smollm3"), **TWO_OF_FOUR) / "config.json")
    assert config["layer_rope_theta"][1] == 0
    assert config["no_rope_layers"] == [1, 0, 1]


def test_the_number_of_experts_has_its_name_of_transformers_4_too(dense, moe):
    config = read_json(moe(dense("qwen3"), target="qwen3_moe", **TWO_OF_FOUR) / "config.json")
    assert config["num_experts"] == TWO_OF_FOUR["experts"]


def long_rope(rotary):
    angles = int(SIZES["hidden_size"] // SIZES["num_attention_heads"] * rotary) // 2
    return {
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            **ROPE,
            "partial_rotary_factor": rotary,
            "short_factor": [1 + i / 9 for i in range(angles)],
            "long_factor": [2 + i for i in range(angles)],
        },
    }


# Values that no default has, for every field that changes the forward pass.
UNUSUAL = {
    "attention_k_eq_v": [False],
    "final_logit_softcapping": [None, 2.0],
    "hidden_activation": ["silu"],
    "hidden_size_per_layer_input": [8],
    "num_kv_shared_layers": [1],
    "use_double_wide_mlp": [True],
    "vocab_size_per_layer_input": [300],
    "attention_bias": [True, False],
    "attention_out_bias": [True],
    "attention_multiplier": [0.1],
    "block_auto_adjust_ff_dim": [False],
    "block_ffn_dim_multiplier": [1.5],
    "block_multiple_of": [40],
    "chunk_size": [8],
    "conv_L_cache": [5],
    "conv_bias": [True],
    "conv_kernel": [3],
    "embedding_multiplier": [2.5],
    "full_attn_idxs": [[0]],
    "head_dim": [24],
    "hidden_act": ["gelu", "relu"],
    "layer_norm_epsilon": [0.05],
    "layers_block_type": [["full_attention", "mlp", "linear_attention", "mlp"]],
    "layer_rope_theta": [[0, 0, 0], [300.0, 300.0, 300.0]],
    "layer_types": [["full_attention", "sliding_attention", "full_attention"]],
    "linear_conv_kernel_dim": [3],
    "linear_key_head_dim": [8],
    "linear_num_key_heads": [1],
    "linear_num_value_heads": [2],
    "linear_value_head_dim": [8],
    "logits_scaling": [0.5],
    "mamba_chunk_size": [8],
    "mamba_conv_bias": [False],
    "mamba_d_conv": [3],
    "mamba_d_head": ["auto"],
    "mamba_d_state": [8],
    "mamba_expand": [4],
    "mamba_head_dim": [12],
    "mamba_hidden_act": ["gelu"],
    "mamba_n_groups": [2],
    "mamba_n_heads": [2],
    "mamba_num_heads": [2],
    "mamba_proj_bias": [True],
    "max_window_layers": [0, 1],
    "mlp_bias": [True],
    "mlp_hidden_act": ["gelu", "relu"],
    "n_groups": [1],
    "no_rope_layer_interval": [2],
    "no_rope_layers": [[0, 0, 1], None],
    "norm_eps": [0.05],
    "kv_lora_rank": [8],
    "num_key_value_heads": [1, 4],
    "num_local_experts": [2],
    "num_nextn_predict_layers": [1],
    "position_embedding_type": ["rope"],
    "q_lora_rank": [None, 8],
    "qk_nope_head_dim": [4],
    "qk_rope_head_dim": [4],
    "residual_multiplier": [0.3],
    "rms_norm_eps": [0.05],
    "rope_interleave": [False],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 300.0}],
    "residual_in_fp32": [True],
    "sliding_window": [5, None],
    "ssm_state_size": [8],
    "tie_word_embeddings": [False, True],
    "time_step_limit": [(0.5, 2.0)],
    "use_bias": [True],
    "use_bidirectional_attention": [True],
    "use_conv_bias": [False],
    "use_post_norm": [True],
    "use_sliding_window": [True],
    "v_head_dim": [4],
}
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
FULL_ROPE = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 1.0}
NESTED_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 900.0,
        "partial_rotary_factor": 0.5,
    },
}
OF_FAMILY = {
    ("gemma4_text", "rope_parameters"): [NESTED_ROPE],
    # A larger one would show: what is normalised twice is not what is normalised once.
    ("gemma4_text", "rms_norm_eps"): [1e-7],
    ("gemma4_text", "sliding_window"): [5],
    # transformers can't run layers that share keys and values without embeddings per layer.
    ("gemma4_text", "num_kv_shared_layers"): [0],
    ("gemma4_text", "use_bidirectional_attention"): ["vision", "all"],
}
"""Where a family's field has other values."""


def unusual(family, field):
    return OF_FAMILY.get((family, field), UNUSUAL[field])


# Of Mamba's sizes, one follows from the others.
WITH = {"mamba_expand": {"mamba_d_head": "auto"}, "mamba_n_heads": {"mamba_d_head": "auto"}}
# Without these the fields about windows change nothing in qwen2 and qwen3.
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
# Fields that size the model or an MoE block, name tokens, act in training only, or stand in
# rope_parameters too.
WITHOUT_EFFECT = set(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    max_position_embeddings original_max_position_embeddings initializer_range use_cache
    embedding_initializer_range
    bos_token_id eos_token_id pad_token_id attention_dropout resid_pdrop embd_pdrop
    residual_dropout pretraining_tp enable_moe_block num_experts top_k_experts
    moe_intermediate_size mask_token_id classifier_pooling
    shared_intermediate_size num_experts_per_tok output_router_logits
    router_aux_loss_coef n_routed_experts n_shared_experts
    moe_shared_expert_intermediate_size moe_latent_size moe_shared_expert_overlap n_group
    topk_group norm_topk_prob routed_scaling_factor mtp_layers_block_type expand hidden_dropout
    time_step_min time_step_max time_step_floor rescale_prenorm_residual mamba_ssm_cache_dtype
    num_logits_to_keep use_mamba_kernels""".split()
)
WITHOUT_A_HOST = {
    ("arcee", "hidden_act"),
    ("ernie4_5", "use_bias"),
    ("gemma", "use_bidirectional_attention"),
    ("granitemoehybrid", "layer_types"),
    ("granitemoehybrid", "num_local_experts"),
    ("hyperclovax", "use_post_norm"),
    ("lfm2", "layer_types"),
    ("nemotron_h", "num_nextn_predict_layers"),
    ("qwen3", "layer_types"),
    ("qwen3", "max_window_layers"),
    ("granite", "mlp_bias"),
    ("llama", "mlp_bias"),
    ("qwen3_5_text", "layer_types"),
    ("gemma4_text", "use_bidirectional_attention"),
    ("eurobert", "mlp_bias"),
}
NO_MODEL = [("youtu", "num_key_value_heads", 1), ("cwm", "sliding_window", None)]
"""Of these transformers itself can't make one: a latent gives all heads their own keys, and cwm
always has a window."""


WINDOW_ON_SOME_LAYERS = {"granite_swa", "ministral"}
# transformers can't run it otherwise.
HEADS_FILL_HIDDEN = {"helium"}


def declared(family):
    fields = set(CONFIG_MAPPING[family].__annotations__) - WITHOUT_EFFECT
    return fields - {"head_dim"} if family in HEADS_FILL_HIDDEN else fields


def cases():
    for family in sorted(FAMILIES):
        for field in sorted(declared(family)):
            yield from ((family, field, value) for value in unusual(family, field))


class TestConfigFields:
    def test_each_that_a_family_declares_is_tested(self):
        assert set().union(*map(declared, FAMILIES)) <= set(UNUSUAL)

    @pytest.mark.parametrize(
        ("family", "field", "value"),
        [case for case in cases() if case not in NO_MODEL],
        ids=str,
    )
    def test_each_is_hosted_or_refused(self, dense, moe, family, field, value):
        fields = (WINDOW if "window" in field or field == "layer_types" else {}) | {field: value}
        if field == "rope_parameters":
            fields[field] = ROPE_OF.get(family, {}) | value
        fields |= WITH.get(field, {})
        reached = exact_hosts(dense, moe, family, **fields)
        needs_window = field == "sliding_window" and family in WINDOW_ON_SOME_LAYERS
        refused = field == "mlp_bias" or (needs_window and value is None)
        assert reached or refused or (family, field) in WITHOUT_A_HOST

    def test_llama_with_attention_bias_goes_to_granitemoeshared(self, dense, moe):
        assert exact_hosts(dense, moe, attention_bias=True) == {"granitemoeshared"}

    @pytest.mark.parametrize("family", sorted(set(FAMILIES) - HEADS_FILL_HIDDEN - {"youtu"}))
    def test_head_dim_needs_not_divide_hidden_size(self, dense, moe, family):
        assert exact_hosts(dense, moe, family, head_dim=24) == HOSTS[family]

    def test_qwen2_with_some_windows_goes_to_qwen2_moe(self, dense, moe):
        reached = exact_hosts(dense, moe, "qwen2", **WINDOW, max_window_layers=1)
        assert reached == {"qwen2_moe", "granitemoe_swa"}

    @pytest.mark.parametrize(("full", "expected"), [(0, {"qwen3_moe", "laguna"}), (1, {"laguna"})])
    def test_qwen3_with_windows(self, dense, moe, full, expected):
        assert exact_hosts(dense, moe, "qwen3", **WINDOW, max_window_layers=full) == expected

    @pytest.mark.parametrize(
        ("family", "expected"), [("llama", LLAMA_LIKE), ("mistral", HOSTS["ministral"])]
    )
    def test_layer_types_are_what_transformers_takes_them_for(self, dense, moe, family, expected):
        """Llama does not read them; a mistral with them is loaded as a ministral."""
        kinds = ["full_attention", "sliding_attention", "full_attention"]
        assert exact_hosts(dense, moe, family, layer_types=kinds) == expected

    def test_mistral_without_a_window_is_a_llama(self, dense, moe):
        assert exact_hosts(dense, moe, "mistral", sliding_window=None) == LLAMA_LIKE

    @pytest.mark.parametrize(
        ("family", "fields"),
        [
            ("ministral", {"layer_types": ["full_attention"] * 3}),
            ("seed_oss", {"attention_bias": False}),
            ("glm", {"attention_bias": False, "rope_parameters": FULL_ROPE}),
            ("hyperclovax", dict.fromkeys(MULTIPLIERS, 1.0) | {"attention_multiplier": None}),
            ("smollm3", {"no_rope_layers": [1, 1, 1]}),
        ],
    )
    def test_without_what_is_its_own_it_is_a_llama(self, dense, moe, family, fields):
        assert exact_hosts(dense, moe, family, **fields) == LLAMA_LIKE

    def test_granite_without_multipliers_is_a_llama(self, dense, moe):
        plain = dict.fromkeys(MULTIPLIERS, 1.0)
        reached = exact_hosts(dense, moe, "granite", attention_multiplier=12**-0.5, **plain)
        assert reached == LLAMA_LIKE


class TestMutations:
    """One mistake in the files moves the logits far beyond every tolerance above."""

    @targets
    @pytest.mark.parametrize("settings", [SPLIT, COPY], ids=["split", "copy"])
    def test_gate_and_up_of_one_expert_swapped(self, dense, moe, tmp_path, target, settings):
        source = dense(FAMILY_OF[target])
        out = moe(source, target=target, shared=0, **settings)
        mutate(out, tmp_path, swap_gate_and_up)
        loaded = load_all_on(tmp_path) if settings is SPLIT else load(tmp_path)
        assert gap(logits(loaded), dense_logits(source)) > MUTATED

    # The norm after gemma4's experts takes whatever gain they have.
    @pytest.mark.parametrize("target", sorted(set(TARGETS) - {"gemma4"}))
    def test_gain_dropped(self, dense, moe, tmp_path, target):
        """With an epsilon so large that the norm after olmo2's FFN does not hide a lost gain."""
        source = dense(FAMILY_OF[target], rms_norm_eps=1.0)
        out = moe(source, target=target, shared=0, **SPLIT)
        mutate(out, tmp_path, drop_gain)
        assert gap(logits(load_all_on(out)), dense_logits(source)) < TOLERANCE["sum"]
        assert gap(logits(load_all_on(tmp_path)), dense_logits(source)) > MUTATED

    @targets
    def test_two_experts_swapped(self, dense, moe, tmp_path, target):
        source = dense(FAMILY_OF[target])
        out = moe(source, target=target, shared=0, **SPLIT)
        mutate(out, tmp_path, swap_experts)
        assert gap(*naive_sum(source, tmp_path)) > MUTATED

    @targets
    def test_two_rows_of_the_router_swapped(self, dense, moe, tmp_path, target):
        """Against the sum over the experts that the right router selects."""
        source = dense(FAMILY_OF[target])
        out = moe(source, target=target, shared=0, **SPLIT)
        mutate(out, tmp_path, swap_router_rows)
        _, expected = naive_sum(source, out)
        assert gap(logits(load(tmp_path)), expected) > MUTATED


def exact_hosts(dense, moe, family="llama", **fields):
    """The targets that host a source with these config fields, each of which must equal it."""
    source = dense(family, **fields)
    try:
        reasons = upcycle.plan(str(source), **COPY).targets
    except UpcycleError:
        return set()
    reached = {name for name, why in reasons.items() if not why}
    expected = dense_logits(source)
    for target in reached:
        out = moe(source, target=target, **COPY)
        assert gap(logits(load(out)), expected) < TOLERANCE["mean"], target
    return reached


def mutate(out, folder, change):
    """A copy of the checkpoint with its second layer's experts and router changed."""
    model = load(out)
    with torch.no_grad():
        change(routers(model)[1], experts(model)[1])
    model.save_pretrained(folder)
    shutil.copy(out / "upcycle.json", folder)


def swap_gate_and_up(router, experts):
    """Without a gate: half of the neurons with the others."""
    first = getattr(experts, "gate_up_proj", getattr(experts, "up_proj", None))[0]
    first.copy_(first.roll(len(first) // 2, 0))


def drop_gain(router, experts):
    experts.down_proj.div_(len(experts.down_proj))


def swap_experts(router, experts):
    for stacked in experts.parameters():
        stacked[:2] = stacked[:2].flip(0)


def swap_router_rows(router, experts):
    rows_ED = getattr(router, "proj", router).weight
    rows_ED[:2] = rows_ED[:2].flip(0)


def store_norms_in_float32(source, folder):
    def mixed(tensors):
        return {k: t.float() if k.endswith("norm.weight") else t for k, t in tensors.items()}

    edited(source, folder, mixed)
