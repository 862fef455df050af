"""Pushing to the hub, against a stand-in of it on this machine."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from upcycle.cli import app


class Hub(BaseHTTPRequestHandler):
    """Takes a repository's files as one commit, as the hub's API does for small ones."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = self.server
        hub.asked.append(self.path)
        if hub.down in self.path:
            return self.answer({"error": "you may not write here"}, 400)
        if self.path == "/api/repos/create":
            hub.made = json.loads(body)
            name = "/".join(filter(None, (hub.made.get("organization"), hub.made["name"])))
            return self.answer({"url": f"{hub.address}/{name}", "name": name})
        if "/preupload/" in self.path:
            named = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in named]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.files[line["value"]["path"]] = content
            address = f"{hub.address}/me/moe/commit/1"
            return self.answer({"commitUrl": address, "commitOid": "1" * 40, "success": True})
        return self.answer({"errors": [], "warnings": []})  # /api/validate-yaml

    def do_GET(self):
        self.server.asked.append(self.path)
        self.answer({"id": "me/moe", "siblings": [], "sha": "0" * 40, "tags": []})

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    server.asked, server.files, server.made, server.down = [], {}, None, "nothing"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


QUICK = ["--method", "copy", "--experts", "2", "--set", "router=normal", "--check", "none"]


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_whole_output_is_pushed(hub, dense, tmp_path):
    """By a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    away = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
    flags = ["-o", tmp_path / "out", *QUICK, "--push-to-hub", "me/moe", "--private", "--json"]
    command = [sys.executable, "-m", "upcycle", "convert", *map(str, [dense(), *flags])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | away)
    assert done.returncode == 0, done.stderr
    assert hub.made["name"] == "moe"
    assert hub.made.get("private") is True or hub.made.get("visibility") == "private"
    assert hub.files == content(tmp_path / "out")
    assert json.loads(done.stdout)["out"] == str(tmp_path / "out")
    assert f"Pushed to {hub.address}/me/moe" in done.stderr


@pytest.mark.parametrize("step", ["/repos/create", "/commit/"])
def test_a_push_that_fails_loses_nothing_and_says_how_to_push_again(
    hub, run, dense, tmp_path, step
):
    hub.down = step
    flags = ["-o", tmp_path / "out put", *QUICK, "--push-to-hub", "me/moe", "--private"]
    done = run("convert", dense(), *flags)
    assert done.exit_code == 2
    *_, last = done.stderr.splitlines()
    assert last.startswith(f"error: {tmp_path}/out put is whole, but pushing it to me/moe failed (")
    assert last.endswith(f": push it again by `hf upload me/moe '{tmp_path}/out put' --private`")
    assert "Traceback" not in done.stderr
    assert "AutoModelForCausalLM.from_pretrained" in done.stdout
    assert (tmp_path / "out put" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out put"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--push-to-hub", "me/the/moe"], "--push-to-hub 'me/the/moe' is no name such as me/model"),
        (["--push-to-hub", "a..b"], "--push-to-hub 'a..b' is no name"),
        (["--private"], "--private goes with --push-to-hub REPO"),
    ],
)
def test_a_name_that_the_hub_does_not_take_is_refused_before_the_work(
    hub, run, dense, tmp_path, flags, words
):
    done = run("convert", dense(), "-o", tmp_path / "out", *QUICK, *flags)
    assert (done.exit_code, hub.asked) == (2, [])
    assert done.stderr.startswith(f"error: {words}")
    assert not list(tmp_path.iterdir())


def test_finetune_pushes_what_it_made(hub, run, dense, moe, text, tmp_path):
    quick = "--steps 1 --seq-len 32 --batch-size 1 --set validation_tokens=32 --lora 2".split()
    done = run(
        "finetune", moe(dense()), "-o", tmp_path / "out", "--data", text,
        "--recipe", "specialise", *quick, "--push-to-hub", "me/moe",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert hub.files == content(tmp_path / "out")
    assert {"adapter_model.safetensors", "tokenizer.json", "README.md"} <= hub.files.keys()
    assert f"Pushed to {hub.address}/me/moe" in done.stdout
