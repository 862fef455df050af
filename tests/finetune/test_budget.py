"""What a run is said to take and to bring, before it is carried out and after its first step."""

import itertools
import json
import math

import pytest
from typer.testing import CliRunner

from upcycle.cli import app
from upcycle.core.words import duration
from upcycle.evaluation.verdict import healed
from upcycle.finetune import rehearsal
from upcycle.finetune.budget import budget
from upcycle.finetune.settings import Training

QUICK = "--steps 4 --seq-len 32 --batch-size 2 --set validation_tokens=32 --lr 1e-3".split()
HEAL = {"distill": 1.0, "teacher": "dense", "train": "all", "seq_len": 512, "batch_size": 1}


@pytest.fixture
def model(dense, moe):
    return moe(dense())


def run(*arguments):
    result = CliRunner().invoke(app, ["finetune", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def test_law_goes_through_the_runs_that_it_is_from():
    """16k tokens left 84 % of the logarithm of the ratio, 65k about 70 % and 131k 63 %."""
    for tokens, left in ((16_384, 0.84), (65_536, 0.70), (131_072, 0.63)):
        assert math.log(healed(2.0, tokens)) / math.log(2.0) == pytest.approx(left, abs=0.01)
    assert healed(2.0, 100) == 2.0


def test_time_is_that_of_all_steps_and_validations():
    made = budget(Training(**HEAL, tokens=131_072), 6.0, 30.0, 2.0)
    assert (made.tokens, made.steps, made.validations) == (131_072, 256, 11)
    assert made.seconds == 256 * 6 + 12 * 30
    assert made.expected == pytest.approx(2**0.633, rel=0.01)
    assert [duration(s) for s in (89.4, 91, 3600, 5 * 3600)] == ["89 s", "2 min", "60 min", "5.0 h"]


@pytest.mark.parametrize(
    ("change", "ratio"),
    [
        ({"lora": 8}, 2.0),
        ({"train": "router"}, 2.0),
        ({"distill": 0.0}, 2.0),
        ({"steps": 9}, 2.0),
        ({}, 0.9),
        ({}, None),
    ],
)
def test_nothing_is_foretold_of_what_was_not_measured(change, ratio):
    assert budget(Training(**HEAL | {"steps": 100} | change), 1.0, 1.0, ratio).expected is None


def test_a_dry_run_writes_nothing_and_foretells_the_run(model, text, tmp_path, monkeypatch):
    clock = itertools.count(step=20)  # each reading is 20 s after the last one
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(rehearsal.time, "monotonic", lambda: next(clock))
        dry = run(model, "--data", text, *QUICK, "--dry-run", "--json")
    assert not list(tmp_path.iterdir())
    found = json.loads(dry.stdout)
    assert dry.stdout.count("\n") == 1
    assert (found["tokens"], found["steps"], found["held"]) == (256, 4, 256)
    assert (found["step_seconds"], found["validation_seconds"]) == (20, 20)
    assert found["seconds"] == 20 * (4 + 5)
    assert [other["steps"] for other in found["others"]] == [1, 2, 8, 16, 32]
    done = json.loads(run(model, "--data", text, "-o", tmp_path / "out", *QUICK, "--json").stdout)
    assert found["ratio"] == done["before"]["perplexity_ratio"]


def test_a_run_says_its_budget_after_the_first_step(model, text, tmp_path):
    shown = run(model, "--data", text, *QUICK, "--dry-run")
    table = " ".join(shown.stdout.split())
    assert "tokens, and what they take here" in table
    assert "asked for" in table
    assert "Expected: nobody knows" in table
    said = run(model, "--data", text, "-o", tmp_path / "out", *QUICK).stderr
    lines = said.splitlines()
    assert sum(line.startswith("budget: 256 tokens in about") for line in lines) == 1
    assert "and 5 validations" in " ".join(said.split())
