"""`eval --top-k`: the same checkpoint at other numbers of experts per token, as copies of it whose
config.json says so compute it."""

import json
import shutil

import pytest
from reference import load, read_json
from typer.testing import CliRunner

from upcycle.cli import app
from upcycle.evaluation.measured import evaluation_summary
from upcycle.evaluation.run import evaluate

LENGTH = {"tokens": 128, "seq_len": 64}
SPLIT = {"experts": 8, "top_k": 4}
COPY = {"method": "copy", "experts": 4, "top_k": 2}
PRUNED = {"method": "prune", "experts": 4, "top_k": 1}
RENORMALISED = "divides weights by their sum, and the gain of 4 is right at 4 experts only: at 2 "
RENORMALISED += "each counts 2 times as much"
MADE = {
    "qwen2_moe": ("llama", SPLIT | {"target": "qwen2_moe"}, ""),
    "mixtral": ("llama", SPLIT | {"target": "mixtral"}, f"mixtral {RENORMALISED}"),
    "granite": ("granite", SPLIT, f"granitemoeshared {RENORMALISED}"),
    "qwen3_moe": ("qwen3", SPLIT, f"qwen3_moe {RENORMALISED}"),
    "glm4_moe": ("llama", SPLIT | {"target": "glm4_moe"}, ""),
    "flex_olmo": ("olmo2", SPLIT, ""),
    "pruned": ("llama", PRUNED, "at 2 they come to 2 times the FFN"),
    "pruned, in mixtral": ("llama", PRUNED | {"target": "mixtral"}, ""),
    "copies": ("llama", COPY, ""),
    "one plain copy": ("llama", COPY | {"top_k": 1}, "at 2 they come to 2 times the FFN"),
    "granular": (
        "llama",
        COPY | {"granularity": 4, "top_k": 4},
        "2 is no multiple of 4 shards: tokens get parts of copies",
    ),
}
"""A checkpoint, and what is said of it at a top-k of 2."""


@pytest.fixture(params=MADE)
def made(request, dense, moe):
    family, settings, note = MADE[request.param]
    source = dense(family)
    return source, moe(source, **settings), note


def test_each_is_what_a_copy_of_the_checkpoint_at_that_top_k_computes(made, text, tmp_path):
    source, folder, note = made
    own = read_json(folder / "config.json")["num_experts_per_tok"]
    report = evaluate(
        str(folder), [str(text), "probes"], against=str(source), top_ks=[2, 3], **LENGTH
    )
    assert [(at.top_k, at.own) for at in report.top_ks] == [
        (k, k == own) for k in sorted({own, 2, 3})
    ]
    for at in report.top_ks:
        copy = tmp_path / str(at.top_k)
        shutil.copytree(folder, copy)
        config = read_json(folder / "config.json") | {"num_experts_per_tok": at.top_k}
        (copy / "config.json").write_text(json.dumps(config))
        alone = evaluate(str(copy), [str(text), "probes"], against=str(source), **LENGTH)
        assert at.texts == alone.texts
        assert (at.active, at.flops) == (alone.params.active, alone.flops.active)
        assert at.active_share == alone.params.active / alone.params.total
        assert at.dead == sum(layer.dead for layer in alone.routing)
    said = {at.top_k: at.note for at in report.top_ks}
    assert said[own] == ""
    assert note in said[2]
    assert bool(note) == bool(said[2])
    assert report.texts == next(at.texts for at in report.top_ks if at.own)


def test_a_row_per_top_k_and_an_object_in_json(dense, moe, text):
    folder = moe(dense(), **SPLIT | {"target": "mixtral"})
    arguments = ["eval", str(folder), "--text", str(text), "--tokens", "64", "--seq-len", "64"]
    shown = CliRunner().invoke(app, [*arguments, "--top-k", "8, 2"], env={"COLUMNS": "100"})
    assert shown.exit_code == 0
    for word in ("experts per token", "│ 2 ", "│ 4, its own", "│ 8 "):
        assert word in shown.stdout
    notes = " ".join(shown.stderr.split())
    assert f"note: --top-k 2: mixtral {RENORMALISED}; convert with --top-k 2" in notes
    assert "at 8 each counts 0.5 times" in notes
    found = json.loads(CliRunner().invoke(app, [*arguments, "--top-k", "4,8", "--json"]).stdout)
    assert [at["top_k"] for at in found["top_ks"]] == [4, 8]
    total = sum(parameter.numel() for parameter in load(folder).parameters())
    assert found["top_ks"][1]["active_share"] == found["top_ks"][1]["active"] / total == 1.0
    assert [row["text"] for row in found["top_ks"][0]["texts"]] == [text.name]


def test_without_it_nothing_is_added(dense, moe, text):
    report = evaluate(str(moe(dense(), **SPLIT)), [str(text)], **LENGTH)
    assert evaluation_summary(report)["top_ks"] == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("9", "--top-k 9: {folder} has 8 experts: give 1 to 8"),
        ("0", "--top-k 0: {folder} has 8 experts: give 1 to 8"),
        ("2;4", "--top-k '2;4': give numbers of experts per token, such as 4,8,16"),
    ],
)
def test_numbers_that_it_can_not_select(dense, moe, words, sentence):
    folder = moe(dense(), **SPLIT)
    done = CliRunner().invoke(app, ["eval", str(folder), "--top-k", words, "--tokens", "64"])
    assert done.exit_code == 2
    assert f"error: {sentence.format(folder=folder)}\n" in done.stderr


def test_a_dense_model_selects_none(dense):
    done = CliRunner().invoke(app, ["eval", str(dense()), "--top-k", "2", "--tokens", "64"])
    assert done.exit_code == 2
    assert f"error: --top-k: {dense()} is dense, without experts to select\n" in done.stderr
