"""Where weights are read from: folders and the hub cache; and inputs that are wrong."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import upcycle
from upcycle import UpcycleError
from upcycle.cli import app
from upcycle.core.types import all_finite
from upcycle.evaluation.run import load_model
from upcycle.models import source
from upcycle.models.source import INDEX, SINGLE, companions, fingerprint, open_source

SHARD_SIZE = "60KB"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
QUICK = {
    "split": "contiguous",
    "calibration": "builtin",
    "calibration_tokens": 64,
    "seq_len": 64,
    "check": "none",
}


@pytest.fixture
def copy(dense, tmp_path):
    """Makes a copy of a tiny one-layer model that a test may spoil."""

    def make(**options) -> Path:
        folder = tmp_path / "model"
        return shutil.copytree(dense(num_hidden_layers=1, **options), folder)

    return make


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder: Path, change) -> None:
    state = load_file(folder / SINGLE)
    change(state)
    save_file(state, folder / SINGLE, metadata={"format": "pt"})


def assert_refused(model, *words: str) -> None:
    """convert ends with exit code 2 and one sentence that holds the words; nothing is written."""
    out = Path(model).parent / "out"
    before = sorted(out.parent.rglob("*"))
    arguments = ["convert", str(model), "-o", str(out), "--json"]
    arguments += ["--calibration-tokens", "64", "--seq-len", "64", "--check", "none"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.exception
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert result.stdout == ""
    assert sorted(out.parent.rglob("*")) == before


# --- folders ---------------------------------------------------------------------------------


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
        source, "safe_open", lambda path, **how: files.append(path.name) or safe_open(path, **how)
    )
    opened.read_layer(1)
    assert set(files) == {opened.tensors[name].file for name in opened.layer_names(1)}
    assert len(files) < len(list(folder.glob("*.safetensors")))


def test_opening_reads_headers_only(dense, monkeypatch):
    monkeypatch.setattr(source.DenseSource, "read", lambda *_: pytest.fail("weights were read"))
    assert open_source(str(dense())).tensors


def test_path_with_home(dense, monkeypatch):
    folder = dense()
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_source(f"~/{folder.name}").folder == folder


def test_unused_rotary_buffer_is_dropped(copy):
    folder = copy()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda state: state.update({name: torch.ones(6)}))
    assert name not in open_source(str(folder)).tensors


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


def test_model_beside_an_older_index_is_what_transformers_loads(copy):
    """Saving a model again, in one file, leaves the index of the former shards."""
    folder = copy()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002"}}))
    AutoModelForCausalLM.from_pretrained(folder)
    assert {info.file for info in open_source(str(folder)).tensors.values()} == {SINGLE}


def test_companions_are_the_small_files_only(copy):
    folder = copy()
    for name in ("LICENSE", "merges.txt", "chat_template.jinja", "notes.txt", "pytorch_model.bin"):
        (folder / name).write_text("x")
    names = {path.name for path in companions(folder)}
    assert names == {
        "LICENSE", "merges.txt", "chat_template.jinja", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["LICENSE", "tokenizer_backup.txt", "README.md", "additional_chat_templates"]
)
def test_link_out_of_the_checkpoint_is_not_published(copy, tmp_path, name):
    folder, outside = copy(), tmp_path / "outside"
    outside.mkdir()
    (outside / "id.jinja").write_text("secret")
    target = outside if name.startswith("additional") else outside / "id.jinja"
    (folder / name).symlink_to(target)
    assert_refused(folder, name, "is a link out of its folder", "put a copy in its place")
    moe = tmp_path / "moe"
    with pytest.raises(UpcycleError, match="is a link out of its folder"):
        upcycle.finetune(str(folder), moe, data="builtin")
    assert not moe.exists()


def test_link_within_the_checkpoint_is_copied(copy, tmp_path):
    folder = copy()
    (folder / "terms.txt").write_text("mine")
    (folder / "LICENSE").symlink_to("terms.txt")
    link = tmp_path / "link"
    link.symlink_to(folder)
    upcycle.convert(str(link), tmp_path / "out", **QUICK)
    assert (tmp_path / "out" / "LICENSE").read_text() == "mine"
    assert not (tmp_path / "out" / "LICENSE").is_symlink()


# --- the hub ---------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cache_model(hub: Path, model: str, folder: Path, revision: str = "main") -> Path:
    repo = hub / f"models--{model.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / revision).write_text(COMMIT)
    return shutil.copytree(folder, repo / "snapshots" / COMMIT)


def test_hub_id_is_found_in_the_cache(hub, dense):
    snapshot = cache_model(hub, "org/tiny", dense())
    opened = open_source("org/tiny")
    assert (opened.folder, opened.label, opened.revision) == (snapshot, "org/tiny", COMMIT)
    assert opened.read_layer(0)


def test_files_of_the_hub_cache_are_links_to_blobs_of_the_same_repository(hub, dense, tmp_path):
    snapshot = cache_model(hub, "org/tiny", dense())
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(p for p in [*snapshot.rglob("*")] if p.is_file()):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    upcycle.convert("org/tiny", tmp_path / "out", **QUICK)
    for path in companions(snapshot):
        copied = tmp_path / "out" / path.relative_to(snapshot)
        assert copied.read_bytes() == path.read_bytes()
        assert not copied.is_symlink()
    other = hub / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text("secret")
    (snapshot / "LICENSE").symlink_to(other / "0")
    with pytest.raises(UpcycleError, match="is a link out of its folder"):
        upcycle.plan("org/tiny", **QUICK)


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_hub_revision_is_a_tag_or_a_commit(hub, dense, revision):
    snapshot = cache_model(hub, "org/tiny", dense(), revision="v1")
    opened = open_source("org/tiny", revision=revision)
    assert (opened.folder, opened.revision) == (snapshot, COMMIT)


def test_revision_that_is_not_in_the_cache(hub, dense):
    cache_model(hub, "org/tiny", dense())
    with pytest.raises(UpcycleError, match=r"org/tiny is not in the local cache .*offline"):
        open_source("org/tiny", revision="v2")


def test_hub_id_that_is_not_in_the_cache_says_offline(hub):
    result = CliRunner().invoke(app, ["plan", "org/tiny"])
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: org/tiny is not in the local cache and the hub can't be reached (offline): "
        "give a local folder, or connect"
    ]


def test_hub_family_is_refused_before_its_weights_are_fetched(hub, dense, monkeypatch):
    snapshot = cache_model(hub, "org/tiny", dense())
    edit_config(snapshot, model_type="opt")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched")
    )
    with pytest.raises(UpcycleError, match="opt can't become a native MoE"):
        open_source("org/tiny")


def test_hub_model_without_weights_in_the_cache(hub, dense):
    (cache_model(hub, "org/tiny", dense()) / SINGLE).unlink()
    with pytest.raises(UpcycleError, match=f"holds neither {SINGLE}"):
        open_source("org/tiny")


def test_revision_of_a_folder_is_refused(dense):
    with pytest.raises(UpcycleError, match="`revision=v1` goes with a hub id"):
        open_source(str(dense()), revision="v1")


# --- what is no model ------------------------------------------------------------------------


def test_missing_path(tmp_path):
    assert_refused(tmp_path / "absent", f"{tmp_path / 'absent'} does not exist")


def test_file_instead_of_a_folder(copy):
    assert_refused(copy() / "config.json", "is a file: give the folder")


def test_empty_folder(tmp_path):
    (tmp_path / "model").mkdir()
    assert_refused(tmp_path / "model", "holds no config.json, so it is not a model folder")


def test_folder_of_an_adapter(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    assert_refused(tmp_path / "model", "holds a low-rank adapter, no model")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"model_type": ', "config.json is not JSON"),
        (b"\xff\xfe", "config.json is not JSON"),
        (b"[]", "config.json is not a JSON object"),
        (b"{}", "config.json has no model_type"),
        (b'{"model_type": "bogus"}', "not a config that transformers reads"),
    ],
)
def test_config_that_is_none(copy, content, words):
    folder = copy()
    (folder / "config.json").write_bytes(content)
    assert_refused(folder, words)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_attention_heads": 5}, "attention heads (5)"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"dtype": "bogus"}, "bogus"),
        ({"hidden_act": "bogus"}, "bogus"),
        ({"vocab_size": -3}, "-3"),
        ({"pad_token_id": 272}, "can't build a model from config.json: Padding_idx"),
        ({"pad_token_id": -273}, "pad_token_id=-273"),
        ({"rope_parameters": {"rope_type": "bogus"}}, "bogus"),
        ({"model_type": "mixtral"}, "is a Mixture-of-Experts already"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config of gptq"),
    ],
)
def test_config_with_a_bad_field(copy, fields, words):
    folder = copy()
    edit_config(folder, **fields)
    assert_refused(folder, words)


# --- weights that are wrong ------------------------------------------------------------------


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


def test_tensor_of_another_shape(copy):
    folder = copy()
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(folder, lambda state: state.update({name: torch.ones(96, 48)}))
    assert_refused(folder, name, "has shape [96, 48], but config.json asks for [192, 48]")


def test_missing_tensor(copy):
    folder = copy()
    edit_weights(folder, lambda state: state.pop("model.norm.weight"))
    assert_refused(folder, "lacks the tensor model.norm.weight")


def test_unexpected_tensor(copy):
    folder = copy()
    name = "model.layers.0.mlp.gate_proj.bias"
    edit_weights(folder, lambda state: state.update({name: torch.ones(192)}))
    assert_refused(folder, f"holds {name}, which llama does not have: it would be lost")


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
