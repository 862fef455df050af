"""Checkpoints that are not as `save_pretrained` writes them: what transformers loads of one is what
is read, converted and said."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle import UpcycleError
from upcycle.models.names import KEY_MAPPING
from upcycle.models.opening import open_source
from upcycle.models.shards import INDEX, SINGLE

IDS = torch.arange(3, 60)[None]
COPIES = {"method": "copy", "experts": 2, "top_k": 2, "allow_frozen_router": True, "check": "none"}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def spoil(dense, tmp_path):
    """Makes a tiny checkpoint whose tensors, and config, are changed."""

    def make(change, *, fields=None, **options) -> Path:
        folder = shutil.copytree(dense(num_hidden_layers=2, **options), tmp_path / "model")
        state = load_file(folder / SINGLE)
        save_file(change(state), folder / SINGLE, metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | (fields or {})))
        return folder

    return make


@torch.no_grad()
def logits_of(folder: Path, **options) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, **options)(IDS).logits.float()


def assert_copies_are(folder: Path, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Copies of the source give these logits."""
    out = folder.parent / "out"
    upcycle.convert(str(folder), out, **COPIES)
    error = (logits_of(out) - expected).abs().max() / expected.std()
    assert error < tolerance


def refusal(folder: Path) -> str:
    with pytest.raises(UpcycleError) as caught:
        open_source(str(folder))
    return str(caught.value)


def notes(folder: Path, **settings) -> str:
    return " ".join(upcycle.plan(str(folder), **COPIES, **settings).warnings)


# --- head and embeddings ---------------------------------------------------------------------


def add_head(state):
    return state | {HEAD: torch.randn(272, 48, generator=torch.manual_seed(1)) * 0.2}


def test_tied_by_config_with_a_head_of_its_own(spoil):
    folder = spoil(add_head, tie_word_embeddings=True)
    assert_copies_are(folder, logits_of(folder))
    assert not upcycle.plan(str(folder), **COPIES).config["tie_word_embeddings"]
    assert f"config.json ties the embeddings, but {HEAD} holds other values" in notes(folder)


def test_tied_with_the_same_head_stored_beside(spoil):
    folder = spoil(lambda state: state | {HEAD: state[EMBED].clone()}, tie_word_embeddings=True)
    assert_copies_are(folder, logits_of(folder))
    assert HEAD not in open_source(str(folder)).tensors
    assert "ties" not in notes(folder)


def test_head_that_differs_in_its_last_row_only(spoil, monkeypatch):
    monkeypatch.setattr("upcycle.models.shards.COMPARED", 1000)

    def change(state):
        head = state[EMBED].clone()
        head[-1, -1] += 1
        return state | {HEAD: head}

    folder = spoil(change, tie_word_embeddings=True)
    assert HEAD in open_source(str(folder)).tensors


def test_tied_and_stored_as_the_head_only(spoil):
    folder = spoil(lambda state: {HEAD: state.pop(EMBED), **state}, tie_word_embeddings=True)
    assert_copies_are(folder, logits_of(folder))
    assert EMBED in open_source(str(folder)).tensors


def test_head_of_another_shape(spoil):
    folder = spoil(lambda state: state | {HEAD: torch.ones(9, 48)}, tie_word_embeddings=True)
    assert f"{HEAD} in {SINGLE} has shape [9, 48]" in refusal(folder)


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_untied_and_one_of_both_missing(spoil, name):
    folder = spoil(lambda state: {k: v for k, v in state.items() if k != name})
    assert f"lacks the tensor {name}" in refusal(folder)


# --- names -----------------------------------------------------------------------------------


def without_base(state):
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("tied", [False, True])
def test_names_of_the_class_without_a_head(spoil, family, tied):
    folder = spoil(without_base, family=family, tie_word_embeddings=tied)
    assert_copies_are(folder, logits_of(folder))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("model.layers.", "model._orig_mod.layers."),
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.{name.removeprefix('model.')}",
    ],
    ids=["compiled", "decoder", "layer", "parallel", "both", "base"],
)
def test_names_of_a_compiled_or_parallel_model(spoil, dense, rename):
    folder = spoil(lambda state: {rename(name): tensor for name, tensor in state.items()})
    expected = logits_of(dense(num_hidden_layers=2))
    assert_copies_are(folder, expected)
    assert torch.equal(logits_of(folder, key_mapping=KEY_MAPPING), expected)


def test_compiled_model_passes_the_check_and_writes_text(spoil, text):
    folder = spoil(lambda state: {f"_orig_mod.{name}": state[name] for name in state})
    settings = COPIES | {"check": "fast", "calibration": str(text), "seq_len": 64}
    assert upcycle.convert(str(folder), folder.parent / "out", **settings).check.exact_error < 1e-5


def test_tensor_by_two_names(spoil):
    folder = spoil(lambda state: state | {"norm.weight": state["model.norm.weight"] * 2})
    assert "holds model.norm.weight twice, as model.norm.weight and as norm.weight" in refusal(
        folder
    )


@pytest.mark.parametrize(
    "name", ["v_head.weight", "model.layers.0.self_attn.rotary_emb.cos_cached", "model.layers.9.x"]
)
def test_tensor_that_no_forward_pass_reads_is_named(spoil, name):
    folder = spoil(lambda state: state | {name: torch.ones(3)})
    assert f"holds {name}, which llama does not have" in refusal(folder)


@pytest.mark.parametrize("place", ["model.layers.0.self_attn.", "model.", ""])
def test_rotary_buffer_is_worked_out_anew(spoil, place):
    folder = spoil(lambda state: state | {f"{place}rotary_emb.inv_freq": torch.ones(6)})
    assert_copies_are(folder, logits_of(folder))


# --- shards ----------------------------------------------------------------------------------


@pytest.fixture
def sharded(dense, tmp_path):
    folder = shutil.copytree(dense(num_hidden_layers=2, shards="60KB"), tmp_path / "model")
    return folder, sorted(folder.glob("*.safetensors"))


def add_to(shard: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(load_file(shard) | {name: tensor}, shard, metadata={"format": "pt"})


def test_tensor_twice_with_the_same_values(sharded):
    folder, shards = sharded
    name, tensor = next(iter(load_file(shards[0]).items()))
    add_to(shards[-1], name, tensor)
    assert_copies_are(folder, logits_of(folder))


def test_tensor_twice_with_other_values(sharded):
    folder, shards = sharded
    name, tensor = next(iter(load_file(shards[0]).items()))
    add_to(shards[-1], name, tensor + 1)
    message = refusal(folder)
    assert f"{name} twice, in {shards[0].name} and {shards[-1].name}" in message


def test_index_that_names_the_wrong_shard(sharded):
    folder, shards = sharded
    index = json.loads((folder / INDEX).read_text())
    places = index["weight_map"]
    first, _ = [name for name, place in places.items() if place == shards[1].name][:2]
    places[first] = shards[-1].name  # and `_` goes on to name the right one
    (folder / INDEX).write_text(json.dumps(index))
    assert_copies_are(folder, logits_of(folder))


def test_index_whose_tensor_no_shard_holds(sharded):
    folder, shards = sharded
    for shard in shards:
        state = load_file(shard)
        if state.pop("model.norm.weight", None) is not None:
            save_file(state, shard, metadata={"format": "pt"})
    assert "lacks the tensor model.norm.weight" in refusal(folder)


# --- dtypes ----------------------------------------------------------------------------------


def widen(word):
    """Makes a part of a bfloat16 checkpoint float32, with values that bfloat16 can't hold."""

    def change(state):
        return {n: t.float() * 1.003 if word in n else t for n, t in state.items()}

    return change


@pytest.mark.parametrize("word", ["norm", "lm_head", "embed", "gate_proj", "layers.1."])
@pytest.mark.parametrize("stated", ["bfloat16", "float32"])
def test_several_dtypes_become_the_one_that_config_states(spoil, word, stated):
    folder = spoil(widen(word), dtype=torch.bfloat16, fields={"dtype": stated})
    model = AutoModelForCausalLM.from_pretrained(folder)
    plan = upcycle.plan(str(folder), **COPIES)
    assert plan.design.dtype == model.dtype == getattr(torch, stated)
    rounded = f"in float32 are rounded to {stated}, as in transformers; `dtype=float32` keeps them"
    assert (rounded in notes(folder)) == (stated == "bfloat16")
    tolerance = 1e-5 if stated == "float32" else 0.1
    assert_copies_are(folder, logits_of(folder), tolerance)


def test_dtypes_that_config_does_not_state_become_the_most_weights(spoil):
    folder = spoil(widen("embed"), dtype=torch.bfloat16, fields={"dtype": None})
    assert upcycle.plan(str(folder), **COPIES).design.dtype == torch.bfloat16
    assert "1 tensors in float32 are rounded to bfloat16" in notes(folder)


def test_asking_for_the_wider_dtype_keeps_every_value(spoil):
    folder = spoil(widen("norm"), dtype=torch.bfloat16)
    assert "rounded" not in notes(folder, dtype="float32")
    out = folder.parent / "out"
    upcycle.convert(str(folder), out, dtype="float32", **COPIES)
    expected = logits_of(folder, dtype=torch.float32)
    torch.testing.assert_close(logits_of(out), expected, rtol=1e-4, atol=1e-4)


def test_split_of_matrices_in_two_dtypes(spoil):
    """The FFN's matrices meet in every computation of a split."""
    folder = spoil(widen("gate_proj"), dtype=torch.bfloat16)
    settings = {"experts": 4, "top_k": 2, "calibration_tokens": 64, "seq_len": 64}
    settings |= {"calibration": "builtin", "check": "none", "keep_dense": "none"}
    upcycle.convert(str(folder), folder.parent / "out", **settings)
