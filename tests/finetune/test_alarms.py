"""Alarms of a run: what lines of a log give cause for, and that they are said while it goes on."""

import json
import math

import pytest
import torch
from reference import experts, load, logits
from torch.nn import functional

from upcycle.console.training import watching_training
from upcycle.core.flags import as_flags
from upcycle.finetune.alarms import FEWEST, JUMP, RECENT, new_alarms
from upcycle.finetune.data import training_data
from upcycle.finetune.preparing import Watch
from upcycle.finetune.run import finetune
from upcycle.models.record.file import read_record
from upcycle.models.train_log import read_log

ROUTING = {"experts": 200, "starved": 3, "imbalance": 2.0, "worst_imbalance": 8.0}
START = {"step": 0, "validation": {}, "texts": {"a": 10.0, "b": 20.0}, "routing": ROUTING}


def steps(*norms):
    return [{"step": number, "grad_norm": norm} for number, norm in enumerate(norms, 1)]


def about(*rows, known=()):
    return [alarm.about for alarm in new_alarms(rows, known)]


# --- of lines alone --------------------------------------------------------------------------


def test_a_gradient_far_above_the_median_of_recent_steps():
    usual = [1.0, 2.0, 3.0] * 3
    (alarm,) = new_alarms([START, *steps(*usual, 1.01 * JUMP * 2)], set())
    assert alarm.step == len(usual) + 1
    assert alarm.says.startswith("the gradient's norm was 20.2, 10 times the median")
    assert not about(START, *steps(*usual, 0.99 * JUMP * 2))
    assert not about(START, *steps(*usual, 100.0), known={"gradient norm"})
    assert not about(START, *steps(*usual[: FEWEST - 1], 100.0))
    assert about(START, *steps(*[100.0] * 200, *[1.0] * RECENT, 1.01 * JUMP))


def test_gradients_that_overflow_are_neither_an_alarm_nor_part_of_the_median():
    """As of float16, whose scale is lowered then."""
    usual = [math.inf] * 9 + [1.0] * FEWEST
    assert not about(START, *steps(*usual, math.inf))
    assert about(START, *steps(*usual, 1.01 * JUMP)) == ["gradient norm"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"starved": 4}, []),
        ({"starved": 5}, ["experts out of use"]),
        ({"experts": 50, "starved": 4}, ["experts out of use"]),
        ({"imbalance": 3.99}, []),
        ({"imbalance": 4.01}, ["imbalance"]),
        ({"imbalance": 1.0, "starved": 0}, []),
    ],
)
def test_routing_on_held_out_text_beside_that_before_training(change, expected):
    row = {"step": 7, "validation": {}, "routing": ROUTING | change}
    assert about(START, *steps(1.0), row) == expected


def test_all_experts_on_for_every_token_are_no_alarm():
    even = {"experts": 2, "starved": 0, "imbalance": 1.0, "worst_imbalance": 1.0}
    first = START | {"routing": even}
    assert not about(first, {"step": 7, "validation": {}, "routing": even})


def test_a_text_worse_than_before_training_is_said_once():
    row = {"step": 7, "validation": {}, "texts": {"a": 10.1, "b": 20.5}}
    (alarm,) = new_alarms([START, row], set())
    assert alarm.about == "perplexity of b"
    assert "the perplexity of b is 20.5, 20 before training" in alarm.says
    assert not about(START, row, known={alarm.about})
    assert about(START, row | {"texts": {"a": 10.3, "b": 19.0}}, known={alarm.about}) == [
        "perplexity of a"
    ]


# --- in a run --------------------------------------------------------------------------------


@pytest.fixture
def model(dense, moe):
    return moe(dense(), target="qwen2_moe", shared=0.25)


@pytest.fixture
def texts(tmp_path):
    """Of two kinds; what is learnt of one tells nothing of the other."""
    for name, line in (("fox", "the quick brown fox jumps. "), ("numbers", "3 1 4 1 5 9 2 6 5 ")):
        (tmp_path / f"{name}.txt").write_text(line * 60)
    return tmp_path / "fox.txt", tmp_path / "numbers.txt"


QUICK = {
    "preset": "specialise", "steps": 6, "seq_len": 32, "batch_size": 2, "validation_tokens": 32,
    "validate_every": 2, "lr": 3e-3,
}  # fmt: skip


def plain_perplexity(folder, tokens_BL, mask_BL):
    """By transformers alone; sequences of a text count by their tokens."""
    total, number, model = 0.0, 0, load(folder)
    for tokens_L, mask_L in zip(tokens_BL, mask_BL, strict=True):
        tokens_L = tokens_L[mask_L]
        z_LV = logits(model, tokens_L[None])[0]
        total += float(functional.cross_entropy(z_LV[:-1], tokens_L[1:], reduction="sum"))
        number += len(tokens_L) - 1
    return math.exp(total / number)


def plain_load(folder, tokens_BL):
    """Per layer, how often each expert is selected, by what the experts are called with."""
    model, seen = load(folder), []
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args: seen.append(args[1].flatten().bincount(minlength=8))
        )
        for module in experts(model)
    ]
    logits(model, tokens_BL)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen).float()


def test_validation_is_per_text_and_tells_how_tokens_are_shared_out(model, texts, tmp_path):
    data = "+".join(map(str, texts))
    done = finetune(str(model), tmp_path / "out", data=data, **QUICK)
    _, held = training_data(
        model, 272, data, seq_len=32, train_tokens=384, validation_tokens=64, seed=0
    )
    rows = [row for row in done.log if "texts" in row]
    assert [list(row["texts"]) for row in rows] == [["fox.txt", "numbers.txt"]] * 4
    for number, (name, (before, after)) in enumerate(done.texts.items()):
        part = held.take((held.text_B == number).nonzero()[:, 0])
        for folder, measured in ((model, before), (done.out, after)):
            expected = plain_perplexity(folder, part.tokens_BL, part.mask_BL)
            assert measured == pytest.approx(expected, rel=1e-4), name
    load_LE = plain_load(model, held.tokens_BL)
    even_LE = load_LE / load_LE.mean(1, keepdim=True)
    routing = rows[0]["routing"]
    assert routing["experts"] == load_LE.numel()
    assert routing["starved"] == int((even_LE < 0.01).sum())
    assert routing["imbalance"] == pytest.approx(float(even_LE.amax(1).mean()), rel=1e-5)


def test_a_text_that_training_is_not_about_gets_worse_and_is_told_of(
    model, texts, tmp_path, capsys
):
    """On the screen once, in the log, in the record; and it does not decide which state is kept."""
    fox, numbers = texts
    settings = QUICK | {"lr": 2e-2, "steps": 16}
    with watching_training(quiet=False) as watch:
        done = finetune(
            str(model), tmp_path / "out", data=str(fox), validate_also=str(numbers), watch=watch,
            **settings,
        )  # fmt: skip
    alarm = next(a for a in done.alarms if a.about == "perplexity of numbers.txt")
    before, after = done.texts["numbers.txt"]
    assert after > 1.02 * before
    assert done.after["loss"] < done.before["loss"]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("the perplexity of numbers.txt is") == 1
    assert f"alarm after step {alarm.step}: {as_flags(alarm.says)}." in said
    log = read_log(done.out / "train_log.jsonl")
    assert [a for line in log for a in line.alarms] == list(done.alarms)
    run = read_record(done.out / "upcycle.json").training[-1]
    assert run.alarms == done.alarms
    card = (done.out / "README.md").read_text()
    assert f"- Alarm after step {alarm.step}: {alarm.says}.\n" in card
    assert f"| perplexity of numbers.txt | {before:.3f} | {after:.3f} |\n" in card
    assert [used.text for used in run.used] == ["fox.txt"]
    alone = finetune(str(model), tmp_path / "alone", data=str(fox), **settings)
    assert alone.result_step == done.result_step
    assert alone.before == done.before


def test_alarms_are_the_same_after_a_resume(model, texts, tmp_path):
    fox, numbers = texts
    settings = QUICK | {"lr": 2e-2, "steps": 8, "data": str(fox), "validate_also": str(numbers)}
    whole = finetune(str(model), tmp_path / "whole", **settings)
    assert whole.alarms

    def stop(row, done, total):
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(str(model), tmp_path / "out", watch=Watch(row=stop), **settings)
    resumed = finetune(str(model), tmp_path / "out", resume=True, **settings)
    assert resumed.alarms == whole.alarms
    lines = (resumed.out / "train_log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == resumed.log
