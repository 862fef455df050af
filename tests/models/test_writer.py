"""Shards that are written in place, with an index."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from upcycle.models.shards import INDEX, SINGLE
from upcycle.models.writer import WRITE_BYTES, CheckpointWriter, TensorSpec

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def tensors_of(*shapes, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return {
        f"tensor{i}": torch.randn(shape, generator=rng).to(dtype) for i, shape in enumerate(shapes)
    }


def specs_of(tensors):
    return [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


def write(folder, tensors, max_shard_bytes=10**9, order=None):
    writer = CheckpointWriter(folder, specs_of(tensors), max_shard_bytes)
    for name in order or tensors:
        writer.write(name, tensors[name])
    return writer


def read(folder):
    """All tensors, by safetensors' own reader; each name once."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                assert name not in found
                found[name] = shard.get_tensor(name)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


# --- shards ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_shard_bytes", [1, 100, 10**9])
def test_written_tensors_are_read_back(tmp_path, dtype, max_shard_bytes):
    tensors = tensors_of((3, 5), (7,), (2, 3, 4), (), dtype=dtype)
    write(tmp_path, tensors, max_shard_bytes)
    assert_same(read(tmp_path), tensors)


def test_tensors_are_written_in_any_order(tmp_path):
    tensors = tensors_of((3, 5), (7,), (4, 4), (6, 2))
    orders = [list(tensors), list(tensors)[::-1], ["tensor2", "tensor0", "tensor3", "tensor1"]]
    contents = []
    for number, order in enumerate(orders):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder, tensors, 100, order)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1] == contents[2]


def test_empty_tensors_have_a_place(tmp_path):
    tensors = tensors_of((0, 4), (3, 3), (4, 0))
    write(tmp_path, tensors)
    assert_same(read(tmp_path), tensors)


def test_only_empty_tensors(tmp_path):
    tensors = tensors_of((0, 4), (0,))
    write(tmp_path, tensors)
    assert_same(read(tmp_path), tensors)


def test_views_and_transposes_are_written_as_they_look(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    views = {"transposed": base.T, "columns": base[:, ::2], "expanded": base[:1].expand(3, 6)}
    write(tmp_path, views)
    assert_same(read(tmp_path), views)


def test_tensors_longer_than_a_write(tmp_path):
    tensors = tensors_of((2, WRITE_BYTES // 4), (3, 7), (WRITE_BYTES // 4 + 5,), (5,))
    write(tmp_path, tensors)
    assert_same(read(tmp_path), tensors)


def test_tensors_of_several_dtypes_share_a_shard(tmp_path):
    tensors = {str(dtype): torch.ones(3, dtype=dtype) for dtype in DTYPES}
    write(tmp_path, tensors)
    assert_same(load_file(tmp_path / SINGLE), tensors)


def test_written_file_is_what_safetensors_marks_as_torch(tmp_path):
    write(tmp_path, tensors_of((3,)))
    with safe_open(tmp_path / SINGLE, framework="pt") as shard:
        assert shard.metadata() == {"format": "pt"}


def test_one_shard_needs_no_index(tmp_path):
    write(tmp_path, tensors_of((4,), (4,)), max_shard_bytes=32)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def test_shards_hold_tensors_in_order_up_to_the_limit(tmp_path):
    tensors = tensors_of((4,), (4,), (4,), (20,), (1,))  # 16, 16, 16, 80 and 4 bytes
    write(tmp_path, tensors, max_shard_bytes=40)
    index = json.loads((tmp_path / INDEX).read_text())
    files = [f"model-{number:05}-of-00004.safetensors" for number in (1, 1, 2, 3, 4)]
    assert index == {
        "metadata": {"total_size": 132},
        "weight_map": dict(zip(tensors, files, strict=True)),
    }
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


@pytest.mark.parametrize(
    "tensor", [torch.ones(5, 3), torch.ones(15), torch.ones(3, 5, dtype=torch.float16)]
)
def test_tensor_that_was_not_planned_so_is_refused(tmp_path, tensor):
    writer = CheckpointWriter(tmp_path, specs_of(tensors_of((3, 5))), 10**9)
    with pytest.raises(ValueError, match=r"tensor0 is .*, planned"):
        writer.write("tensor0", tensor)
    with pytest.raises(KeyError):
        writer.write("tensor1", tensor)
    assert (read(tmp_path)["tensor0"] == 0).all()


def test_a_second_writer_keeps_what_the_first_one_wrote(tmp_path):
    tensors = tensors_of((3, 5), (7,), (2, 2))
    first = CheckpointWriter(tmp_path, specs_of(tensors), 60)
    first.write("tensor1", tensors["tensor1"])
    write(tmp_path, tensors, 60, ["tensor0", "tensor2"])
    assert_same(read(tmp_path), tensors)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_room_is_taken_before_the_first_tensor(tmp_path):
    CheckpointWriter(tmp_path, specs_of(tensors_of((1024, 256))), 10**9)
    assert (tmp_path / SINGLE).stat().st_blocks * 512 >= 2**20


def test_systems_without_fallocate(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    tensors = tensors_of((3, 5), (0, 2), (7,))
    write(tmp_path, tensors, order=["tensor2"])
    assert read(tmp_path)["tensor1"].shape == (0, 2)
    assert torch.equal(read(tmp_path)["tensor2"], tensors["tensor2"])
