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
from upcycle.finetune.budget import Look, budget
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


@pytest.mark.parametrize(
    ("before", "tokens", "after"),
    [
        (1.20, 32_768, 1.09),  # SmolLM2-135M, three quarters
        (1.20, 131_072, 1.06),
        (1.60, 32_768, 1.42),  # half, by `thorough`
        (1.60, 131_072, 1.36),
        (1.60, 524_288, 1.32),
        (2.00, 32_768, 1.67),  # half, the default
        (2.00, 131_072, 1.62),
        (2.68, 32_768, 2.19),  # a quarter
        (2.68, 131_072, 2.03),
        (1.47, 131_072, 1.19),  # Qwen2.5-Coder-0.5B, half
    ],
)
def test_law_comes_near_the_runs_that_it_is_from(before, tokens, after):
    """benchmarks/results/frontier.json."""
    assert healed(before, tokens) == pytest.approx(after, rel=0.05)


def test_law_ends_at_no_loss_and_at_no_number():
    assert healed(1.000001, 131_072) == pytest.approx(1.0, abs=1e-6)
    assert healed(math.inf, 131_072) == math.inf
    assert healed(2.0, 32_768) > healed(2.0, 131_072) > 1


def seen(settings, trained=256, ratio=2.0, tokens=None):
    """A step of 6 s, a validation of 12 sequences of 30 s, half a second a sequence once."""
    return Look(settings, trained, tokens, 12, 12 * 512, 6.0, 30.0, 0.5, ratio)


def test_time_is_that_of_all_steps_and_validations_and_of_the_teacher():
    asked = Training(**HEAL, tokens=131_072)
    made = budget(asked, seen(asked))
    assert (made.tokens, made.steps) == (131_072, 256)
    assert (made.validations, made.validation_tokens) == (4, 12 * 512)
    assert made.seconds == 256 * 6 + 5 * 30 + 12 * 0.5
    assert made.expected == healed(2.0, 131_072)
    stored = Training(**HEAL, tokens=131_072, teacher_top_k=8)
    assert budget(stored, seen(stored)).teacher_seconds == (12 + 256) * 0.5
    assert [duration(s) for s in (89.4, 91, 3600, 5 * 3600)] == ["89 s", "2 min", "60 min", "5.0 h"]


@pytest.mark.parametrize(
    ("change", "ratio"),
    [
        ({"lora": 8}, 2.0),
        ({"train": "router"}, 2.0),
        ({"distill": 0.0, "teacher": None}, 2.0),
        ({"steps": 9}, 2.0),
        ({}, 0.9),
        ({}, None),
    ],
)
def test_nothing_is_foretold_of_what_was_not_measured(change, ratio):
    settings = Training(**HEAL | {"steps": 100} | change)
    assert budget(settings, seen(settings, ratio=ratio)).expected is None


def test_what_a_text_brings_that_is_read_again_is_not_known():
    asked = Training(**HEAL, tokens=131_072)
    found = [budget(asked, seen(asked, tokens=131_072 // n)) for n in (1, 2)]
    assert [made.passes for made in found] == [1, 2]
    assert [made.expected for made in found] == [healed(2.0, 131_072), None]


@pytest.mark.parametrize("steps", [4, 400])
def test_a_dry_run_says_how_often_a_text_is_read(model, text, steps):
    """Of one that the run leaves most of, and of one that it reads whole."""
    request = (model, "--data", text, *QUICK, "--steps", steps, "--dry-run")
    passes = json.loads(run(*request, "--json").stdout)["passes"]
    assert passes == pytest.approx(steps * 64 / (len(text.read_bytes()) - 32), rel=0.02)
    said = " ".join(run(*request).stdout.split())
    if steps == 4:
        assert "would be read" not in said
    else:
        assert f"would be read {passes:.1f} times, by the longest" in said


def test_others_hold_back_as_much_as_their_length_lets_them():
    """But no more than there is, of a text that is read several times."""
    asked = Training(**HEAL, tokens=65_536, teacher_top_k=8)
    longer = asked.model_copy(update={"tokens": 2**20})
    made = budget(longer, seen(asked, trained=128))
    assert (made.validations, made.validation_tokens) == (10, round(12 * 512 * 8192 / 3072))
    assert made.validation_seconds == pytest.approx(30 * 8192 / 3072)
    assert made.teacher_seconds == pytest.approx(0.5 * (12 * 8192 / 3072 + 2048))
    again = budget(longer, seen(asked, trained=100))
    assert (again.validation_tokens, again.validation_seconds) == (12 * 512, 30)
    assert again.teacher_seconds == 0.5 * (12 + 100)
    shorter = longer.model_copy(update={"tokens": 131_072})  # of a text of 100 sequences, too
    assert budget(shorter, seen(longer, trained=100)).validation_tokens == 12 * 512


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
    assert found["seconds"] == 20 * (4 + 2) + 20
    assert [other["steps"] for other in found["others"]] == [1, 2, 8, 16, 32]
    assert found["teacher_seconds"] == 20
    done = json.loads(run(model, "--data", text, "-o", tmp_path / "out", *QUICK, "--json").stdout)
    assert found["ratio"] == done["before"]["perplexity_ratio"]


def test_a_dry_run_foretells_what_a_stored_teacher_takes(model, text, monkeypatch):
    """By the four sequences of two steps and the one that is held out, of nine in all."""
    clock = itertools.count(step=20)
    with monkeypatch.context() as patch:
        patch.setattr(rehearsal.time, "monotonic", lambda: next(clock))
        stored = ("--set", "teacher_top_k=8")
        found = json.loads(
            run(model, "--data", text, *QUICK, *stored, "--dry-run", "--json").stdout
        )
    assert found["teacher_seconds"] == pytest.approx(20 / 5 * 9)
    assert found["seconds"] == pytest.approx(20 * (4 + 2) + 20 / 5 * 9)


def test_a_run_says_its_budget_after_the_first_step(model, text, tmp_path):
    shown = run(model, "--data", text, *QUICK, "--dry-run")
    table = " ".join(shown.stdout.split())
    assert "tokens, and what they take here" in table
    assert "asked for" in table
    assert "Expected: nobody knows" in table
    said = run(model, "--data", text, "-o", tmp_path / "out", *QUICK).stderr
    lines = said.splitlines()
    assert sum(line.startswith("budget: 256 tokens in about") for line in lines) == 1
    assert "and 2 validations of 32" in " ".join(said.split())
