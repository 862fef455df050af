"""The files of weights: those that transformers reads, and those that are not whole."""

import json

import pytest
import torch
from spoiled import SHARD_SIZE, assert_refused, edit_weights
from transformers import AutoModelForCausalLM

from upcycle.models.opening import open_source
from upcycle.models.shards import INDEX, SINGLE


def test_model_beside_an_older_index_is_what_transformers_loads(copy):
    """Saving a model again, in one file, leaves the index of the former shards."""
    folder = copy()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002"}}))
    AutoModelForCausalLM.from_pretrained(folder)
    assert {info.file for info in open_source(str(folder)).tensors.values()} == {SINGLE}


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_truncated_weights(copy, kept):
    path = copy() / SINGLE
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert_refused(path.parent, str(path), "is not a whole safetensors file")


def test_no_weights(copy):
    folder = copy()
    (folder / SINGLE).unlink()
    assert_refused(folder, f"holds neither {SINGLE} nor {INDEX}")


def test_pickled_weights_only(copy):
    folder = copy()
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert_refused(folder, "convert its .bin files to safetensors first")


def test_index_that_names_a_missing_shard(copy):
    folder = copy(shards=SHARD_SIZE)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    assert_refused(folder, INDEX, f"names {shard.name!r}, which is not in {folder}")


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_index_that_names_a_path_outside(copy, place):
    folder = copy(shards=SHARD_SIZE)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = place
    (folder / INDEX).write_text(json.dumps(index))
    assert_refused(folder, INDEX, f"names {place!r}, which is outside its folder")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_index_without_a_map(copy, content):
    folder = copy(shards=SHARD_SIZE)
    (folder / INDEX).write_text(content)
    assert_refused(folder, f"{INDEX} has no weight_map")


@pytest.mark.parametrize(
    ("dtype", "code"),
    [(torch.int8, "I8"), (torch.int64, "I64"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_quantised_weights(copy, dtype, code):
    folder = copy()
    name = "model.layers.0.mlp.down_proj.weight"
    edit_weights(folder, lambda state: state.update({name: state[name].to(dtype)}))
    assert_refused(
        folder, f"{name} in {folder / SINGLE} is stored as {code}", "quantization_config"
    )
