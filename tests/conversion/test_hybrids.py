"""What other runtimes read of a hybrid model's config.json."""

import pytest
from reference import read_json

import upcycle

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
