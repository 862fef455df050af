"""Layers of several kinds, and FFNs without gates: what plans, cards and other runtimes read."""

import pytest
from reference import read_json, weights
from tiny import PLAIN_SPLIT

import upcycle
from upcycle.core.errors import UpcycleError

COPY = {"method": "copy", "experts": 2, "top_k": 2}


@pytest.mark.parametrize(("positions", "written"), [("rope", "rope"), (None, "nope")])
def test_granites_kinds_of_layers_and_positions_have_the_names_that_runtimes_know(
    dense, moe, positions, written
):
    """mlx-lm rotates unless it says `nope`; it and llama.cpp know no other kinds."""
    source = dense("granitemoehybrid", position_embedding_type=positions)
    config = read_json(moe(source, **COPY) / "config.json")
    assert config["layer_types"] == ["mamba", "attention", "mamba"]
    assert config["position_embedding_type"] == written


@pytest.mark.parametrize(
    ("kind", "positions", "refused"),
    [
        ("linear_attention", None, ""),
        ("linear_attention", "rope", "beside Mamba layers attention has no rotary embedding"),
        ("full_attention", "rope", ""),
        ("full_attention", None, "without Mamba layers attention has rotary embedding"),
    ],
)
def test_llama_cpp_tells_positions_by_the_kinds_of_granites_layers(dense, kind, positions, refused):
    layers = ["full_attention", kind, "full_attention"]
    source = dense("granitemoehybrid", layer_types=layers, position_embedding_type=positions)
    assert upcycle.plan(str(source), check="none", **COPY).runtimes["llama.cpp"] == refused


def test_nemotrons_layers_are_also_a_pattern(dense, moe):
    """llama.cpp's converter and mlx-lm read that; names are those of the published checkpoints."""
    out = moe(dense("nemotron_h"), shared=0, experts=8, top_k=2, keep_dense="3")
    config = read_json(out / "config.json")
    assert config["hybrid_override_pattern"] == "ME*-E"
    assert config["num_hidden_layers"] == 5
    names = set(weights(out))
    assert "backbone.layers.1.mixer.experts.7.up_proj.weight" in names
    assert all(name.startswith("backbone.") for name in names - {"lm_head.weight"})


def test_layers_without_an_ffn_are_no_layers_to_keep_dense(dense):
    source = str(dense("nemotron_h"))
    with pytest.raises(UpcycleError, match="layer 0, which has no FFN to keep dense"):
        upcycle.plan(source, keep_dense="0")
    with pytest.raises(UpcycleError, match="names every layer"):
        upcycle.plan(source, keep_dense="1,3,4")


def test_damage_is_measured_where_there_is_an_ffn(dense, tmp_path):
    settings = PLAIN_SPLIT | {"experts": 8, "top_k": None, "active": 0.8, "keep_dense": "auto"}
    size = {"calibration_tokens": 256, "seq_len": 64, "check": "none", "split": "random"}
    made = upcycle.convert(str(dense("nemotron_h")), tmp_path / "out", **settings | size)
    damage = made.dense_layers.damage
    assert [value > 0 for value in damage] == [False, True, False, True, True]
    assert set(made.dense_layers.layers) <= {1, 3, 4}
    assert {layer for t in made.dense_layers.trials for layer in t.layers} >= {1, 4}


@pytest.mark.parametrize("kept", ["none", "0"])
def test_a_gate_that_the_source_has_not_is_counted_and_said(dense, moe, kept):
    wanted = {"target": "qwen2_moe", "experts": 8, "top_k": 4, "shared": 0, "keep_dense": kept}
    out = moe(dense("arcee"), **wanted)
    config, record = read_json(out / "config.json"), read_json(out / "upcycle.json")["plan"]
    assert config["hidden_act"] == "relu"
    tensors = weights(out)
    routed = sum(t.numel() for name, t in tensors.items() if ".experts." in name)
    layers = 3 if kept == "none" else 2
    assert routed == layers * 3 * 48 * 192  # the dense FFNs have two matrices
    assert record["params_total"] == sum(t.numel() for t in tensors.values())
    assert record["params_active"] == record["params_total"] - routed // 2
    work = {"none": "50 % of the neurons are 75 %", "0": "67 % of the neurons are 100 %"}[kept]
    (said,) = (note for note in record["warnings"] if "stored twice" in note)
    assert work in said
    assert ("saves nothing" in said) == (kept == "0")
    assert said in (out / "README.md").read_text()


def test_no_gate_is_said_of_targets_that_have_none(dense, moe):
    out = moe(dense("nemotron_h"), experts=8, top_k=4, shared=0)
    assert "stored twice" not in (out / "README.md").read_text()
    assert "stored twice" not in str(read_json(out / "upcycle.json")["plan"]["warnings"])
