"""`upcycle eval`: its flags, its table, its JSON object and its errors."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from processes import kill, killed
from reference import load, weights
from safetensors.torch import save_file
from tiny import make_tokenizer
from typer.testing import CliRunner

import upcycle
from upcycle.cli import app
from upcycle.evaluation import run as stage
from upcycle.evaluation import speed

LENGTH = ["--tokens", "64", "--seq-len", "64"]


@pytest.fixture(scope="session")
def split(dense, moe):
    return moe(dense(), experts=8, top_k=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "DECODE_STEPS", 2)


def run(*arguments):
    result = CliRunner().invoke(app, ["eval", *(str(a) for a in arguments), *LENGTH])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def test_one_json_object(dense, split, text):
    result = run(split, "--against", dense(), "--text", text, "--text", "builtin", "--json")
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    report = json.loads(result.stdout)
    assert (report["model"], report["against"]) == (split.name, dense().name)
    assert [row["text"] for row in report["texts"]] == [text.name, "builtin"]


def test_text_that_the_model_was_fitted_on_is_noted(dense, tmp_path):
    upcycle.convert(
        str(dense()), tmp_path / "out", experts=4, calibration_tokens=64, seq_len=64, check="none"
    )
    note = "note: the model was fitted on builtin: on other text it may lose more"
    assert note in " ".join(run(tmp_path / "out", "--text", "builtin").stderr.split())
    assert "fitted" not in run(tmp_path / "out").stderr


def test_by_default_eight_thousand_tokens_of_probes_are_read(dense):
    arguments = ["eval", str(dense()), "--json"]
    report = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert [row["text"] for row in report["texts"]] == ["probes"]
    assert (report["tokens"], report["window"]) == (8192, 512)


def test_output_that_is_killed_or_fails_leaves_the_former_file(dense, text, tmp_path, monkeypatch):
    file = tmp_path / "eval.json"
    file.write_text("former")

    def act():
        monkeypatch.setattr("os.fsync", kill)
        run(dense(), "--text", text, "--output", file)

    assert killed(act)
    assert file.read_text() == "former"
    link = tmp_path / "latest.json"
    link.symlink_to(file)
    assert run(dense(), "--text", text, "--output", link).exit_code == 0
    assert json.loads(file.read_text())["texts"]
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "latest.json"]


def test_output_holds_the_same_object(dense, text, tmp_path):
    file = tmp_path / "eval.json"
    printed = run(dense(), "--text", text, "--output", file, "--json").stdout
    assert json.loads(file.read_text()) == json.loads(printed)


def test_table(dense, split, text, tmp_path):
    arguments = ["--text", text, "--text", "builtin", "--speed", "--output", tmp_path / "eval.json"]
    result = run(split, "--against", dense(), *arguments)
    assert result.exit_code == 0
    for word in (
        *("perplexity", "worst", "window", "KL, nats", "same next", "builtin"),
        *("MoE layers", "expert load", "load entropy", "dead experts", "expert similarity"),
        *("parameters", "active per token", "FLOPs per token", "(dense"),
        *("prefill", "decode", "tokens/s", "float32", "experts by"),
        "Measured on 64 tokens of each text, windows of 64.",
    ):
        assert word in result.stdout, word
    assert (tmp_path / "eval.json").is_file()


def test_table_of_a_dense_model(dense, text):
    result = run(dense(), "--text", text)
    assert result.exit_code == 0
    for word in ("expert", "KL", "(dense", "tokens/s"):
        assert word not in result.stdout, word


@pytest.mark.parametrize("against", [True, False])
def test_table_of_tasks(dense, text, monkeypatch, against):
    scores = {"arc_easy": {"acc": [0.25, 0.5 if against else None]}}
    asked = []
    monkeypatch.setattr(stage, "open_tasks", lambda names: asked.append(names) or "tasks")
    monkeypatch.setattr(stage, "run_tasks", lambda *args, **settings: scores)
    beside = ["--against", dense()] if against else []
    result = run(dense(), "--text", text, "--tasks", "arc_easy, hellaswag", *beside)
    assert asked == [["arc_easy", "hellaswag"]]
    assert "arc_easy, acc" in result.stdout
    assert "0.2500" in result.stdout
    assert ("0.5000" in result.stdout) == against


def test_perplexity_that_is_no_number_is_said_plainly(dense, text, tmp_path):
    model = load(dense())
    model.lm_head.weight.data.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    result = run(tmp_path, "--against", dense(), "--text", text)
    assert result.exit_code == 0
    assert f"on {text} perplexity is nan: the logits overflow" in result.stderr.replace("\n", "")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--text", "nowhere.txt"], "--text 'nowhere.txt' is not a file"),
        (["--dtype", "int8"], "--dtype 'int8' is unknown: give auto, float32"),
        (["--device", "tpu"], "--device 'tpu' is not a device: give auto, cpu or cuda"),
        (["--speed", "--batch-size", 2], "--batch-size 2 needs as many windows of text"),
        (["--batch-size", 2], "--batch-size 2 has no effect without --speed or --tasks"),
        (["--output", "nowhere/eval.json"], "--output nowhere/eval.json: nowhere is no folder"),
        (["--output", "."], "--output . is a folder: give a file"),
        (["--output", "closed/eval.json"], "--output closed/eval.json can't be written"),
        (["--tasks", "toy"], "--tasks needs `pip install upcycle[eval]`"),
        (["--against", "./nowhere"], "./nowhere does not exist"),
    ],
)
def test_bad_flag(dense, tmp_path, monkeypatch, flags, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "closed")
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    result = run(dense(), *flags)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {sentence}")


def test_a_folder_that_lacks_a_tensor_is_the_users_fault(split, text, tmp_path):
    tensors = weights(split)
    del tensors["model.norm.weight"]
    shutil.copytree(split, tmp_path / "broken")
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    result = run(tmp_path / "broken", "--text", text)
    assert result.exit_code == 2
    assert "does not load whole: missing_keys ['model.norm.weight']" in result.stderr


def test_json_of_a_broken_model_is_json(dense, text, tmp_path):
    """Whose perplexity is no number; what is read back is."""
    model = load(dense())
    model.lm_head.weight.data.fill_(torch.nan)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    saved = tmp_path / "eval.json"
    result = run(
        tmp_path, "--text", text, "--tokens", 64, "--seq-len", 32, "--output", saved, "--json"
    )
    for written in (result.stdout, saved.read_text()):
        assert "NaN" not in written.replace('"NaN"', "")
        assert json.loads(written)["texts"][0]["perplexity"] == "NaN"
