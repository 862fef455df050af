"""Copies of a tiny model that a test spoils, and what the command line says of them."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from upcycle.cli import app
from upcycle.models.shards import SINGLE

SHARD_SIZE = "60KB"


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
