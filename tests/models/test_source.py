"""A dense source: its tensors by their names, whole and as they were when it was opened."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from spoiled import SHARD_SIZE, assert_refused, edit_weights
from tiny import QUICK

import upcycle
from upcycle.core.types import all_finite
from upcycle.models import shards, source
from upcycle.models.opening import open_source
from upcycle.models.shards import SINGLE


def test_folder_of_one_file_yields_every_tensor(dense):
    folder = dense()
    opened = open_source(str(folder))
    found = opened.read(list(opened.tensors))
    expected = load_file(folder / SINGLE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert opened.revision is None


def test_sharded_folder_yields_the_same_tensors(dense):
    whole, sharded = open_source(str(dense())), open_source(str(dense(shards=SHARD_SIZE)))
    assert len({info.file for info in sharded.tensors.values()}) > 1
    expected = whole.read(list(whole.tensors))
    found = sharded.read(list(sharded.tensors))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layer_names_lose_their_prefix(dense):
    layer = open_source(str(dense())).read_layer(1)
    assert layer["mlp.gate_proj.weight"].shape == (192, 48)
    assert not any(name.startswith("model.") for name in layer)


def test_layers_and_the_rest_are_all_tensors(dense):
    opened = open_source(str(dense()))
    layers = [name for layer in range(3) for name in opened.layer_names(layer)]
    assert sorted(layers + opened.outer_names()) == sorted(opened.tensors)


def test_layer_1_is_not_layer_10(dense):
    opened = open_source(str(dense(num_hidden_layers=11)))
    assert len(opened.layer_names(1)) == len(opened.layer_names(10)) == 9


def test_reading_a_layer_opens_only_its_files(dense, monkeypatch):
    folder = dense(shards=SHARD_SIZE)
    opened = open_source(str(folder))
    files = []
    monkeypatch.setattr(
        shards, "safe_open", lambda path, **how: files.append(path.name) or safe_open(path, **how)
    )
    opened.read_layer(1)
    assert set(files) == {opened.tensors[name].file for name in opened.layer_names(1)}
    assert len(files) < len(list(folder.glob("*.safetensors")))


def test_norms_in_float32_beside_bfloat16_weights(copy):
    folder = copy(dtype=torch.bfloat16)

    def widen_norms(state):
        state |= {name: state[name].float() for name in state if "norm" in name}

    edit_weights(folder, widen_norms)
    upcycle.convert(str(folder), folder.parent / "out", **QUICK)
    source, made = load_file(folder / SINGLE), load_file(folder.parent / "out" / SINGLE)
    norms = {name for name in source if "norm" in name}
    assert len(norms) == 3
    assert norms == {name for name in made if "norm" in name}
    for name in norms:  # no bfloat16 was narrowed or widened on its way, so nothing is lost
        assert torch.equal(made[name].float(), source[name])


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_not_finite(copy, name, value):
    folder = copy()
    edit_weights(folder, lambda state: state[name][3].fill_(float(value)))
    assert_refused(folder, f"{name} in {SINGLE} holds NaN or infinity")


def test_each_tensor_is_searched_once_for_all_copies(dense, tmp_path, monkeypatch):
    searched = []

    def search(tensor):
        searched.append(tensor.clone())
        return all_finite(tensor)

    monkeypatch.setattr(source, "all_finite", search)
    upcycle.convert(str(dense()), tmp_path / "out", method="copy", experts=4, check="none")
    stored = load_file(dense() / SINGLE)
    assert len(searched) == len(stored)
    for tensor in stored.values():
        assert sum(torch.equal(tensor, each) for each in searched) == 1
