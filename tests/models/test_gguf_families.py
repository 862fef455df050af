"""GGUF files of each family: every tensor and every config field is what the file was made from."""

import gguf
import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from published import draft_layer
from reference import dense_logits, gap, load, logits
from safetensors.torch import load_file, save_file

import upcycle
from upcycle import UpcycleError
from upcycle.models.families import FAMILIES as DENSE
from upcycle.models.gguf.architectures import STORED
from upcycle.models.loading import load_model
from upcycle.models.opening import open_source

GEMMA4 = {"tie_word_embeddings": True}
FAMILIES = [
    ("arcee", {"attention_bias": True}),
    ("ernie4_5", {}),
    ("gemma", {"tie_word_embeddings": True}),
    ("gemma4_text", GEMMA4),
    (
        "gemma4_text",
        GEMMA4 | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 272}
        | {"num_kv_shared_layers": 1, "attention_k_eq_v": False, "final_logit_softcapping": None},
    ),
    ("granite", {}),
    ("granitemoehybrid", {"position_embedding_type": "nope", "mamba_n_groups": 2}),
    ("lfm2", {}),
    ("lfm2", {"tie_word_embeddings": True, "conv_bias": True}),
    ("nemotron_h", {}),
    ("olmo2", {}),
    ("qwen3_5_text", {}),
    ("seed_oss", {}),
    ("smollm3", {"no_rope_layers": None, "num_hidden_layers": 5}),
]  # fmt: skip
WITHOUT_EFFECT = {
    "granitemoehybrid": {"mamba_chunk_size", "max_position_embeddings"},
    "nemotron_h": {"chunk_size"},
    "lfm2": {"intermediate_size", "block_auto_adjust_ff_dim", "block_multiple_of"},
}
"""Fields that a file does not hold, or of which it has the result."""
PLAIN = {"calibration": "builtin", "calibration_tokens": 64, "seq_len": 64, "check": "none"}


@pytest.mark.parametrize(("family", "fields"), FAMILIES)
def test_every_tensor_is_what_the_file_was_made_from(dense, tmp_path, family, fields):
    folder = dense(family, **fields)
    opened = open_source(str(write_gguf(tmp_path / "tiny.gguf", folder)))
    original = open_source(str(folder))
    found, expected = opened.read(list(opened.tensors)), original.read(list(original.tensors))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    model = load_model(opened.folder, torch.float32, torch.device("cpu"))
    assert gap(logits(model), dense_logits(folder)) < 2e-4


@pytest.mark.parametrize(("family", "fields"), FAMILIES)
def test_config_says_what_it_said(dense, tmp_path, family, fields):
    folder = dense(family, **fields)
    ours = open_source(str(write_gguf(tmp_path / "tiny.gguf", folder))).arch
    theirs = open_source(str(folder)).arch
    assert ours.traits.keys() == theirs.traits.keys()
    assert (ours.intermediate_size, ours.bare_layers) == (
        theirs.intermediate_size,
        theirs.bare_layers,
    )
    said = {"dtype", "initializer_range", "pad_token_id", "rope_parameters"}
    for name in theirs.fields.keys() - said - WITHOUT_EFFECT.get(family, set()):
        assert ours.fields[name] == theirs.fields[name], name


@pytest.mark.parametrize("family", ["gemma4_text", "granitemoehybrid", "lfm2", "qwen3_5_text"])
def test_copies_of_a_gguf_compute_what_it_was_made_from(dense, tmp_path, family):
    folder = dense(family, **(GEMMA4 if family == "gemma4_text" else {}))
    path = write_gguf(tmp_path / "tiny.gguf", folder)
    upcycle.convert(str(path), tmp_path / "out", recipe="sparse-upcycling", experts=2, **PLAIN)
    assert gap(logits(load(tmp_path / "out")), dense_logits(folder)) < 5e-4


def test_layers_that_draft_tokens_come_along(dense, tmp_path):
    folder = dense("qwen3_5_text", mtp_num_hidden_layers=1, num_hidden_layers=4, layer_types=None)
    tensors = load_file(folder / "model.safetensors")
    named = {n.replace("model.", "model.language_model.", 1): t for n, t in tensors.items()}
    drafts = {n: t for n, t in draft_layer(named).items() if n.startswith("mtp.")}
    whole = tmp_path / "whole"
    whole.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (whole / name).write_bytes((folder / name).read_bytes())
    save_file(tensors | drafts, whole / "model.safetensors", metadata={"format": "pt"})
    opened = open_source(str(write_gguf(tmp_path / "tiny.gguf", whole)))
    assert opened.drafts == ("mtp.layers.0.",)
    assert opened.config.num_hidden_layers == 4
    for name, tensor in opened.read(sorted(drafts)).items():
        torch.testing.assert_close(tensor, drafts[name], rtol=1e-6, atol=1e-6)


def test_matrices_that_nobody_uses_come_along(dense, tmp_path):
    shared = {"num_kv_shared_layers": 1, "attention_k_eq_v": False}
    folder = dense("gemma4_text", **GEMMA4, **shared)
    tensors = {"blk.2.attn_v.weight": np.ones((32, 48), dtype=np.float32)}
    opened = open_source(str(write_gguf(tmp_path / "tiny.gguf", folder, tensors=tensors)))
    assert opened.parts == {"model.layers.2.self_attn.v_proj.weight"}


def test_granite_4_without_mamba_layers_is_stored_as_a_granite(dense, tmp_path):
    of_hybrids = {
        "attention.head_count_kv": [2, 2, 2],
        "expert_count": 0,
        "expert_used_count": 0,
        "expert_shared_feed_forward_length": 192,
        "rope.scaling.finetuned": True,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 96,
    }
    folder = dense("granite")
    keys = {f"granite.{key}": value for key, value in of_hybrids.items()}
    opened = open_source(str(write_gguf(tmp_path / "tiny.gguf", folder, keys=keys)))
    assert opened.config.num_key_value_heads == 2
    model = load_model(opened.folder, torch.float32, torch.device("cpu"))
    assert gap(logits(model), dense_logits(folder)) < 1e-5


def test_mistral_3_without_scaled_queries_is_a_mistral(dense, tmp_path):
    folder = dense("mistral", sliding_window=None)
    path = write_gguf(tmp_path / "tiny.gguf", folder)
    assert open_source(str(path)).config.model_type == "mistral"


@pytest.mark.parametrize(("split", "said"), [("refact", 1), ("qwen35", 0), ("gpt-2", 0)])
def test_text_that_transformers_splits_in_another_way(dense, tmp_path, split, said):
    keys = {"tokenizer.ggml.pre": split}
    path = write_gguf(tmp_path / "tiny.gguf", dense("granite"), keys=keys)
    notes = open_source(str(path)).notes
    assert len([note for note in notes if f"tokenizer.ggml.pre={split}" in note]) == said


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "keys", "words"),
    [
        ("granite", {"granite.rope.scaling.finetuned": False}, "a granite without a rotary"),
        ("gemma4_text", {"gemma4.rope.dimension_count": 8}, "rotates 8 and 16 channels of heads"),
        ("gemma4_text", {"gemma4.attention.head_count_kv": [2, 1]}, "one for each of 3 layers"),
        (
            "gemma4_text",
            {
                "gemma4.feed_forward_length": [192, 192, 384],
                "gemma4.attention.shared_kv_layers": 1,
            },
            "experts of two widths",
        ),
        ("lfm2", {"lfm2.attention.head_count_kv": None}, "lacks the key lfm2.attention.head_co"),
        ("qwen3_5_text", {"qwen35.ssm.state_size": 8}, "blk.0.ssm_conv1d.weight in"),
    ],
)
def test_keys_of_a_family_that_are_not_understood(dense, tmp_path, family, keys, words):
    folder = dense(family, **(GEMMA4 if family == "gemma4_text" else {}))
    path = write_gguf(tmp_path / "tiny.gguf", folder, keys=keys)
    with pytest.raises(UpcycleError, match=words):
        open_source(str(path))


def test_divisors_of_gemma_4_that_are_not_understood(dense, tmp_path):
    tensors = {"rope_freqs.weight": np.array([1.0] * 4 + [2.0] * 12, dtype=np.float32)}
    path = write_gguf(tmp_path / "tiny.gguf", dense("gemma4_text", **GEMMA4), tensors=tensors)
    with pytest.raises(UpcycleError, match="whose values are not those of gemma 4"):
        open_source(str(path))


def test_every_family_that_is_read_is_one_that_is_converted():
    assert {stored.model_type for stored in STORED.values()} <= set(DENSE)


def test_moe_of_an_architecture_that_is_not_read(dense, tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "deepseek2")
    writer.add_expert_count(8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UpcycleError, match="is of a Mixture-of-Experts already"):
        open_source(str(path))
