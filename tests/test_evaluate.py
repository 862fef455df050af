"""Evaluation: its numbers are those of plain loops, alone and against the dense model."""

import json
import math

import pytest
import torch
from reference import load
from typer.testing import CliRunner

from upcycle import UpcycleError
from upcycle.calibrate import packed_tokens
from upcycle.cli import app
from upcycle.evaluate import evaluate

LENGTH = {"tokens": 192, "seq_len": 64}


@pytest.fixture(scope="session")
def split(dense, moe):
    return moe(dense(), experts=8, top_k=2)


def naive_log_probs(folder, text):
    model = load(folder)
    windows = packed_tokens(folder, 272, str(text), 3, 64)
    with torch.no_grad():
        return windows, model(windows).logits.double().log_softmax(-1)


def naive_perplexity(windows, log_probs):
    losses = [
        -log_probs[b, t, windows[b, t + 1]].item()
        for b in range(len(windows))
        for t in range(windows.shape[1] - 1)
    ]
    return math.exp(sum(losses) / len(losses))


def test_perplexity_alone(dense, text):
    report = evaluate(str(dense()), str(text), **LENGTH)
    assert report.perplexity == pytest.approx(naive_perplexity(*naive_log_probs(dense(), text)))
    assert report.kl is report.top1_agreement is report.perplexity_ratio is None
    assert report.load == []


def test_against_the_dense_model(dense, split, text):
    report = evaluate(str(split), str(text), against=str(dense()), **LENGTH)
    windows, expected = naive_log_probs(dense(), text)
    _, actual = naive_log_probs(split, text)
    kl = (expected.exp() * (expected - actual)).sum(-1).mean().item()
    same = (expected.argmax(-1) == actual.argmax(-1)).double().mean().item()
    assert report.perplexity == pytest.approx(naive_perplexity(windows, actual))
    assert report.perplexity_against == pytest.approx(naive_perplexity(windows, expected))
    assert report.kl == pytest.approx(kl, rel=1e-2)  # the reference is kept in float16
    assert report.top1_agreement == pytest.approx(same)
    assert report.perplexity_ratio == pytest.approx(report.perplexity / report.perplexity_against)


def test_a_model_against_itself_is_no_different(dense, text):
    report = evaluate(str(dense()), str(text), against=str(dense()), **LENGTH)
    assert report.perplexity_ratio == 1
    assert report.kl == pytest.approx(0, abs=1e-5)
    assert report.top1_agreement == 1


def test_load_is_in_fair_shares(dense, split, text):
    report = evaluate(str(split), str(text), **LENGTH)
    assert len(report.load) == 3
    for layer in report.load:
        assert sum(layer) / len(layer) == pytest.approx(1, abs=1e-3)


def test_command_line_prints_one_json_object(dense, split, text):
    arguments = ["eval", str(split), "--against", str(dense()), "--text", str(text), "--json"]
    result = CliRunner().invoke(app, [*arguments, "--tokens", "64", "--seq-len", "64"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["perplexity_ratio"] > 0


def test_command_line_prints_a_table(dense, split, text):
    arguments = ["eval", str(split), "--against", str(dense()), "--text", str(text)]
    result = CliRunner().invoke(app, [*arguments, "--tokens", "64", "--seq-len", "64"])
    assert result.exit_code == 0
    assert "KL to dense" in result.stdout
    assert "dead experts" in result.stdout


def test_too_little_text(dense, text):
    with pytest.raises(UpcycleError, match=r"holds [\d,]+ tokens, but 9,999,872 are needed"):
        evaluate(str(dense()), str(text), tokens=10**7, seq_len=512)


def test_model_that_is_not_there(text):
    with pytest.raises(UpcycleError, match="does not exist"):
        evaluate("./nowhere", str(text))


@pytest.mark.parametrize("name", ["self", "none", "nowhere.txt"])
def test_text_that_is_no_text(dense, name):
    with pytest.raises(UpcycleError, match=f"--text '{name}' is not a file: give builtin, hf:"):
        evaluate(str(dense()), name)
