"""What is fetched of a hub id, and when, against a stand-in of the hub on this machine."""

import hashlib
import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import upcycle
from upcycle import UpcycleError
from upcycle.cli import app
from upcycle.conversion.inspection import inspect_model
from upcycle.models.opening import open_source
from upcycle.models.record.file import DOMAINS
from upcycle.models.shards import INDEX, SINGLE

COMMIT = "0123456789abcdef0123456789abcdef01234567"
QUICK = {"method": "copy", "experts": 2, "router": "normal", "check": "none"}
HEADER = 100_001  # bytes of a file that huggingface_hub asks for to find its header in


class Hub(BaseHTTPRequestHandler):
    """Gives the files of `org/tiny`, whole or in part."""

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, *, send):
        hub = self.server
        if self.path.startswith("/api/models/org/tiny"):
            names = sorted(path.name for path in hub.folder.iterdir())
            siblings = [{"rfilename": name} for name in names]
            if "/tree/" in self.path:
                value = [{"type": "file", "path": n, "size": 1, "oid": "1" * 40} for n in names]
            else:
                value = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings, "tags": []}
            return self.give(json.dumps(value).encode(), send=send)
        match = re.fullmatch(r"/org/tiny/resolve/(?:main|[0-9a-f]{40})/(.+)", self.path)
        path = hub.folder / match[1] if match else None
        if path is None or not path.is_file():
            return self.give(b"", 404, {"X-Error-Code": "EntryNotFound"}, send=send)
        content = path.read_bytes()
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if part and send:
            content = content[int(part[1]) : int(part[2]) + 1]
        if send:
            hub.sent[match[1]] = hub.sent.get(match[1], 0) + len(content)
        etag = hashlib.sha256(path.read_bytes()).hexdigest()
        about = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
        return self.give(content, 206 if part else 200, about, send=send)

    def give(self, data, status=200, headers=None, *, send):
        self.server.asked.append((self.command, self.path))
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if send:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub, with an empty folder for its one model; and an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.sent, server.folder = [], {}, tmp_path / "remote"
    server.folder.mkdir()
    server.cache = tmp_path / "cache"
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(server.cache))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def publish(hub, folder):
    for path in folder.iterdir():
        (hub.folder / path.name).write_bytes(path.read_bytes())


def weight_files(hub):
    return {path.name: path.stat().st_size for path in hub.folder.glob("*.safetensors")}


def test_plan_and_inspect_fetch_headers_and_no_weights(hub, dense):
    publish(hub, dense(vocab_size=40_000))
    made = upcycle.plan("org/tiny", **QUICK)
    local = upcycle.plan(str(hub.folder), **QUICK)
    assert made.units == local.units
    assert (made.params_dense, made.target) == (local.params_dense, local.target)
    assert inspect_model("org/tiny") == inspect_model(str(hub.folder)) | {"model": "org/tiny"}
    assert hub.sent[SINGLE] == 2 * HEADER < weight_files(hub)[SINGLE] / 10
    assert not list(hub.cache.rglob("*.safetensors"))


def test_headers_of_shards_take_a_request_each(hub, dense):
    publish(hub, dense(shards="60KB"))
    assert upcycle.plan("org/tiny", **QUICK).units == upcycle.plan(str(hub.folder), **QUICK).units
    names = weight_files(hub)
    assert len(names) > 3
    for name in names:
        asked = [path for command, path in hub.asked if command == "GET" and path.endswith(name)]
        assert len(asked) == 1
    assert not list(hub.cache.rglob("*.safetensors"))


@pytest.mark.parametrize("shards", [None, "60KB"])
def test_convert_fetches_the_weights_once(hub, dense, tmp_path, shards):
    publish(hub, dense(shards=shards))
    upcycle.plan("org/tiny", **QUICK)
    before = dict(hub.sent)
    upcycle.convert("org/tiny", tmp_path / "out", **QUICK)
    upcycle.convert(str(hub.folder), tmp_path / "local", **QUICK)
    outs = [load_file(tmp_path / out / SINGLE) for out in ("out", "local")]
    assert all(torch.equal(tensor, outs[1][name]) for name, tensor in outs[0].items())
    for name, size in weight_files(hub).items():
        assert hub.sent[name] - before[name] == min(size, HEADER) + size
    unchanged = {name: sent for name, sent in hub.sent.items() if name not in weight_files(hub)}
    assert unchanged == {name: before[name] for name in unchanged}


def test_what_was_fetched_is_found_without_the_network(hub, dense, tmp_path, monkeypatch):
    publish(hub, dense())
    upcycle.convert("org/tiny", tmp_path / "out", **QUICK)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert open_source("org/tiny").read_layer(0)
    upcycle.plan("org/tiny", **QUICK)
    assert hub.asked == []


def test_plan_without_the_network_needs_the_weights(hub, dense, monkeypatch):
    publish(hub, dense())
    upcycle.plan("org/tiny", **QUICK)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UpcycleError, match=f"holds neither {SINGLE} nor {INDEX}"):
        upcycle.plan("org/tiny", **QUICK)


@pytest.mark.parametrize("flags", [["--top-k", "9", "--experts", "8"], ["--target", "qwen3_moe"]])
def test_convert_is_refused_before_the_weights(hub, dense, tmp_path, flags):
    publish(hub, dense(vocab_size=40_000))
    out = ["convert", "org/tiny", "-o", str(tmp_path / "out"), "--method", "split"]
    assert CliRunner().invoke(app, [*out, *flags]).exit_code == 2
    assert hub.sent.get(SINGLE, 0) <= HEADER


def test_family_is_refused_by_its_config_alone(hub, dense):
    publish(hub, dense())
    path = hub.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "opt"}))
    with pytest.raises(UpcycleError, match="opt can't become a native MoE"):
        upcycle.plan("org/tiny")
    assert hub.sent.keys() == {"config.json"}


def test_a_head_beside_tied_embeddings_is_compared(hub, dense):
    publish(hub, dense(tie_word_embeddings=True))
    state = load_file(hub.folder / SINGLE)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * 2
    save_file(state, hub.folder / SINGLE)
    assert "lm_head.weight" in open_source("org/tiny").tensors


def test_what_gate_domain_left_is_fetched_with_a_merge(hub, shelf, tmp_path):
    """When its weights are, even if these are here already; but not where another router is
    asked for."""
    texts = {name: tmp_path / f"{name}.txt" for name in ("m1", "m2", "m3")}
    for name, letters in zip(texts, ("ABCDEFGH", "stuvwxyz", "0123456789"), strict=True):
        texts[name].write_text("".join(random.Random(name).choices(letters, k=2000)))
    base, third = str(shelf / "base"), str(shelf / "m3")
    quick = {"check": "none", "seq_len": 64, "calibration_tokens": 512, "base": base}
    named = {name: str(texts[name]) for name in ("m1", "m2")}
    experts = [str(shelf / name) for name in named]
    upcycle.merge(experts, tmp_path / "moe", text=named, router="domain", **quick)
    publish(hub, tmp_path / "moe")
    add = quick | {"add": third, "text": str(texts["m3"])}
    upcycle.merge("org/tiny", tmp_path / "text", router="text", **add)
    assert hub.sent[SINGLE] > weight_files(hub)[SINGLE]
    assert DOMAINS not in hub.sent
    upcycle.merge("org/tiny", tmp_path / "out", **add)
    assert hub.sent[DOMAINS] == weight_files(hub)[DOMAINS]
    upcycle.merge(tmp_path / "moe", tmp_path / "local", **add)
    for name in (SINGLE, DOMAINS):
        ours, theirs = (load_file(tmp_path / folder / name) for folder in ("out", "local"))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys())


def test_a_merge_on_the_hub_without_what_gate_domain_left_is_refused(hub, shelf, tmp_path):
    base, experts = str(shelf / "base"), [str(shelf / name) for name in ("m1", "m2")]
    how = {"base": base, "check": "none"}
    upcycle.merge(experts, tmp_path / "moe", router="normal", **how)
    publish(hub, tmp_path / "moe")
    text = tmp_path / "text.txt"
    text.write_text("a text" * 100)
    add = how | {"add": str(shelf / "m3"), "text": str(text), "router": "domain"}
    with pytest.raises(UpcycleError, match=f"org/tiny holds no {DOMAINS}, by which"):
        upcycle.merge("org/tiny", tmp_path / "out", **add)
    assert hub.sent[SINGLE] <= HEADER


def test_weights_of_other_formats_and_damaged_ones(hub, dense):
    publish(hub, dense())
    (hub.folder / SINGLE).write_bytes(b"\xff" * 64)
    with pytest.raises(UpcycleError, match="org/tiny holds a damaged safetensors file"):
        upcycle.plan("org/tiny", **QUICK)
    (hub.folder / SINGLE).rename(hub.folder / "pytorch_model.bin")
    with pytest.raises(UpcycleError, match=f"holds neither {SINGLE} nor {INDEX}"):
        upcycle.plan("org/tiny", **QUICK)
