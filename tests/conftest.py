"""Fixtures that every test file may use."""

import random
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from published import make_published
from tiny import HOLDERS, PLAIN_SPLIT, make_dense, make_holder, make_lora, make_moved, once
from transformers.utils import logging

import upcycle
from upcycle.conversion import run as conversion
from upcycle.finetune import run as training_run

torch.set_num_threads(1)
logging.disable_progress_bar()
logging.set_verbosity_error()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """What models write is kept here, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """Makes a tiny dense checkpoint, once per session and options; leave its folder as it is."""

    @once
    def make(family: str = "llama", *, dtype=torch.float32, shards=None, **fields) -> Path:
        folder = tmp_path_factory.mktemp(f"dense-{family}-")
        return make_dense(folder, family, dtype=dtype, shards=shards, **fields)

    return make


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Makes a tiny model of several parts, a holder or a published one, once per session and
    options; leave its folder as it is."""

    @once
    def make(name: str, *, dtype=torch.float32, **fields) -> Path:
        write = make_holder if name in HOLDERS else make_published
        return write(tmp_path_factory.mktemp(name), name, dtype=dtype, **fields)

    return make


@pytest.fixture
def copy(dense, tmp_path):
    """Makes a copy of a tiny one-layer model that a test may spoil."""

    def make(**options) -> Path:
        folder = tmp_path / "model"
        return shutil.copytree(dense(num_hidden_layers=1, **options), folder)

    return make


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """A folder of models to merge: base, three fine-tunes of it, m1 to m3, and an adapter, lora1;
    leave it as it is."""
    folder = tmp_path_factory.mktemp("shelf")
    make_dense(folder / "base")
    for seed in (1, 2, 3):
        make_moved(folder / f"m{seed}", folder / "base", seed)
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    make_lora(folder / "lora1", folder / "base", targets, r=4, lora_alpha=8)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of random letters to calibrate on, enough for 8192 of the tiny models' tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz .,\n", k=9000)))
    return path


@pytest.fixture(scope="session")
def moe(tmp_path_factory, text):
    """Converts a source by the quickest methods, to an exact partition and without the check, once
    per session and settings; leave its folder as it is."""
    quick = PLAIN_SPLIT | {
        "split": "random",
        "router": "normal",
        "calibration": str(text),
        "calibration_tokens": 256,
        "seq_len": 64,
        "check": "none",
    }

    @once
    def convert(source: Path, **settings) -> Path:
        out = tmp_path_factory.mktemp("moe") / "out"
        upcycle.convert(str(source), out, **(quick | settings))
        return out

    return convert


@pytest.fixture
def threads_asked_for(monkeypatch):
    """With how many threads every run computes; they are not started, for which a busy machine
    may take minutes."""
    asked = []

    def ask(count):
        asked.append(count)
        return nullcontext()

    for stage in (conversion, training_run):
        monkeypatch.setattr(stage, "torch_threads", ask)
    return asked
