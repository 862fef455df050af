"""Weights as they are read, and the digests by which they are known again."""

import json
import os

import pytest
import torch
from spoiled import SHARD_SIZE, edit_weights
from transformers import AutoModelForCausalLM

from upcycle import UpcycleError
from upcycle.models.loading import load_model
from upcycle.models.opening import open_source
from upcycle.models.shards import SINGLE
from upcycle.models.weights import fingerprint


def test_fingerprint_tells_shapes_and_config_apart(dense):
    models = [dense(), dense(num_hidden_layers=1), dense(rope_theta=5000.0), dense("qwen2")]
    prints = [open_source(str(folder)).fingerprint() for folder in models]
    assert len(set(prints)) == len(models)
    assert prints[0] == open_source(str(models[0])).fingerprint()


def flip(folder, name, element=-1):
    """Change the sign of one element in place, and leave size and times of the file alone."""
    path = folder / SINGLE
    times = path.stat()
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))[name]
        start, end = header["data_offsets"]
        width = (end - start) // torch.Size(header["shape"]).numel()
        place = 8 + size + (end if element < 0 else start) + element * width + width - 1
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x80]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("element", [0, 7, -1])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_fingerprint_is_of_all_bytes(copy, name, element):
    folder = copy()
    before = open_source(str(folder)).fingerprint(), fingerprint(folder)
    flip(folder, name, element)
    after = open_source(str(folder)).fingerprint(), fingerprint(folder)
    assert before[0] != after[0]
    assert before[1] != after[1]
    flip(folder, name, element)
    assert (open_source(str(folder)).fingerprint(), fingerprint(folder)) == before


def test_fingerprint_is_the_same_however_the_source_is_sharded(dense):
    one, many = dense(), dense(shards=SHARD_SIZE)
    assert open_source(str(one)).fingerprint() == open_source(str(many)).fingerprint()


def test_fingerprint_tells_dtypes_of_the_same_bytes_apart(copy):
    folder = copy(dtype=torch.bfloat16)
    before = open_source(str(folder)).fingerprint()

    def reinterpret(state):
        state |= {name: tensor.view(torch.float16) for name, tensor in state.items()}

    edit_weights(folder, reinterpret)
    assert open_source(str(folder)).fingerprint() != before


def test_tensor_that_changes_after_the_fingerprint_is_noticed(copy):
    folder = copy()
    opened = open_source(str(folder))
    opened.fingerprint()
    flip(folder, "model.norm.weight")
    opened.read(["model.embed_tokens.weight"])
    with pytest.raises(UpcycleError, match=r"model\.norm\.weight in .* changed while it was read"):
        opened.read(["model.norm.weight"])
    with pytest.raises(UpcycleError, match=r"model\.norm\.weight in .* changed while it was read"):
        opened.verify()


def test_file_that_is_cut_short_while_it_is_read_is_an_error(copy):
    folder = copy()
    opened = open_source(str(folder))
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size // 2)
    for act in (
        lambda: opened.read(opened.outer_names()),
        opened.fingerprint,
        lambda: load_model(folder, torch.float32, torch.device("cpu")),
    ):
        with pytest.raises(UpcycleError, match=r"model\.safetensors is not a whole safetensors"):
            act()


def test_what_was_read_stays_whatever_happens_to_the_file(copy):
    """Mapped bytes would change with it, or end the process."""
    folder = copy()
    names = open_source(str(folder)).outer_names()
    found = open_source(str(folder)).read(names)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    expected = {name: tensor.clone() for name, tensor in found.items()}
    (folder / SINGLE).write_bytes(b"")
    for name in names:
        assert torch.equal(found[name], expected[name])
        assert torch.equal(model.state_dict()[name], expected[name])


def test_models_are_loaded_with_tensors_of_no_elements_and_of_all_shards(dense, moe):
    for folder in (moe(dense(), target="glm4_moe"), dense(shards=SHARD_SIZE)):
        model = load_model(folder, torch.float32, torch.device("cpu"))
        plain = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert model.state_dict().keys() == plain.keys()
        assert all(torch.equal(t, plain[name]) for name, t in model.state_dict().items())
