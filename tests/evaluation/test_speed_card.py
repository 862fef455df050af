"""`upcycle eval --speed --card`: the card holds the last measured speed, and all it held before."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from upcycle import UpcycleError
from upcycle.cli import app
from upcycle.evaluation import run as stage
from upcycle.evaluation import speed
from upcycle.evaluation.run import evaluate
from upcycle.evaluation.speed import Speed
from upcycle.evaluation.speed_card import BEGIN, END, write_speed

BESIDE = Speed(2, 1, "bfloat16", "grouped_mm", 1500.0, 30.0, 1000.0, 40.0, "Some CPU")
ALONE = replace(BESIDE, prefill_against=None, decode_against=None)


@pytest.fixture
def out(dense, moe, tmp_path):
    """A folder that upcycle wrote."""
    return Path(shutil.copytree(moe(dense(), experts=8, top_k=2), tmp_path / "out"))


@pytest.fixture(scope="session")
def measured(dense, text):
    return evaluate(str(dense()), [str(text)], tokens=64, seq_len=64)


def section(folder):
    text = (folder / "README.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    return text[text.index(BEGIN) : text.index(END)]


def table(folder):
    lines = (line for line in section(folder).splitlines() if line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_speed_beside_the_dense_model(out, measured):
    before = (out / "README.md").read_text()
    write_speed(replace(measured, model=str(out), speed=BESIDE))
    assert table(out) == [
        ["tokens per second", "dense", "this model", ""],
        ["---", "---", "---", "---"],
        ["prefill", "1000", "1500", "1.50 ×"],
        ["decode", "40.0", "30.0", "0.75 ×"],
    ]
    for words in ("Some CPU", "1 CPU thread,", "bfloat16", "2 sequences of 64", "`grouped_mm`"):
        assert words in section(out)
    assert (out / "README.md").read_text().startswith(before.rstrip())


def test_speed_alone(out, measured):
    write_speed(replace(measured, model=str(out), speed=ALONE))
    assert table(out)[0] == ["tokens per second", "this model"]
    assert table(out)[2:] == [["prefill", "1500"], ["decode", "30.0"]]


def test_earlier_speed_is_replaced_and_the_rest_stays(out, measured):
    first = replace(measured, model=str(out), speed=replace(BESIDE, machine="Former"))
    write_speed(first)
    with (out / "README.md").open("a") as card:
        card.write("\n## Trained\n\nWords added later.\n")
    write_speed(replace(first, speed=BESIDE))
    text = (out / "README.md").read_text()
    assert "Former" not in text
    assert "\n\n## Trained\n\nWords added later.\n" in text
    assert "Some CPU" in section(out)
    write_speed(replace(first, speed=BESIDE))
    assert (out / "README.md").read_text() == text


def test_folder_without_a_card_gets_one(out, measured):
    (out / "README.md").unlink()
    write_speed(replace(measured, model=str(out), speed=BESIDE))
    assert (out / "README.md").read_text().startswith(BEGIN)


def test_failure_leaves_the_former_card_alone(out, measured, monkeypatch):
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_speed(replace(measured, model=str(out), speed=BESIDE))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


# --- the command -----------------------------------------------------------------------------


def run(*arguments):
    sizes = ["--tokens", "64", "--seq-len", "64"]
    return CliRunner().invoke(app, ["eval", *(str(a) for a in arguments), *sizes])


def test_command_writes_what_it_measured(dense, out, text, monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "DECODE_STEPS", 2)
    result = run(out, "--against", dense(), "--text", text, "--speed", "--card", "--json")
    found = json.loads(result.stdout)["speed"]
    assert table(out)[2][1:3] == [f"{found['prefill_against']:.0f}", f"{found['prefill']:.0f}"]
    assert table(out)[3][1:3] == [f"{found['decode_against']:.1f}", f"{found['decode']:.1f}"]
    assert found["machine"] in section(out)


def hub(out):
    return "org/model"


def not_ours(out):
    (out / "upcycle.json").unlink()
    return out


def no_text(out):
    (out / "README.md").write_bytes(b"\xff\xfe")
    return out


def closed(out):
    out.chmod(0o500)
    return out


@pytest.mark.parametrize(
    ("change", "flags", "sentence"),
    [
        (Path, [], "--card writes the measured speed to the model card: add --speed"),
        (hub, ["--speed"], "--card writes to the card of a folder here, which org/model is not"),
        (not_ours, ["--speed"], "holds no upcycle.json, so upcycle did not write it"),
        (no_text, ["--speed"], "is not UTF-8 text: restore or delete it"),
        (closed, ["--speed"], "is not writable: make it so, or drop --card"),
    ],
)
def test_what_can_not_be_written_is_refused_before_the_work(
    out, monkeypatch, change, flags, sentence
):
    monkeypatch.setattr(stage, "evaluate", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr("os.access", lambda path, mode: path.stat().st_mode & 0o200 != 0)
    result = run(change(out), "--card", *flags)
    out.chmod(0o700)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --card")
    assert sentence in line


def test_card_is_not_written_without_a_speed(out, measured):
    with pytest.raises(UpcycleError, match="add `speed`"):
        write_speed(replace(measured, model=str(out)))
