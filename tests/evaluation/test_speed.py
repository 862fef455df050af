"""Speed: what is timed, in which order, and what is made of the times."""

import pytest
import torch
from reference import load

from upcycle.core.machine import device_name
from upcycle.evaluation import speed
from upcycle.evaluation.speed import measure_speed, tokens_per_second

WINDOWS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 3)
    monkeypatch.setattr(speed, "DECODE_STEPS", 4)


def quiet(done, rounds):
    pass


def test_both_models_take_turns(dense, monkeypatch):
    """A B A B …, after one unmeasured run of each; then the median counts."""
    model, other = load(dense()), load(dense())
    times = iter([(1, 1), (1, 1), (10, 2), (20, 4), (50, 3), (10, 6), (30, 9), (40, 5)])
    ran = []
    monkeypatch.setattr(speed, "ROUNDS", 3)
    monkeypatch.setattr(
        speed, "tokens_per_second", lambda each, windows: ran.append(each) or next(times)
    )
    measured = measure_speed(model, other, WINDOWS, quiet)
    assert [each is model for each in ran] == [True, False] * 4
    assert (measured.prefill, measured.decode) == (30, 3)
    assert (measured.prefill_against, measured.decode_against) == (20, 5)


def test_alone_there_is_nothing_to_compare(dense, quick):
    measured = measure_speed(load(dense()), None, WINDOWS, quiet)
    assert measured.prefill_against is measured.decode_against is None
    assert measured.experts_implementation == "none"


def test_conditions_are_reported(dense, moe, quick):
    model = load(moe(dense(), experts=8, top_k=2), experts_implementation="eager")
    measured = measure_speed(model, load(dense()), WINDOWS, quiet)
    assert measured.batch_size == 2
    assert measured.threads == torch.get_num_threads()
    assert measured.dtype == "float32"
    assert measured.experts_implementation == "eager"
    assert measured.machine == device_name(torch.device("cpu")) != ""
    rates = (measured.prefill, measured.decode, measured.prefill_against, measured.decode_against)
    assert all(rate > 0 for rate in rates)


def test_decoding_is_generate(dense, quick, monkeypatch):
    """The tokens that are decoded while time is taken are those of greedy generation."""
    model, seen = load(dense()), []
    model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["input_ids"]), with_kwargs=True
    )
    tokens_per_second(model, WINDOWS)
    assert [step.shape for step in seen] == [(2, 24)] + [(2, 1)] * 4
    expected = load(dense()).generate(
        WINDOWS, attention_mask=torch.ones_like(WINDOWS), max_new_tokens=4, do_sample=False
    )
    assert torch.equal(torch.cat(seen[1:], 1), expected[:, 24:])


def test_rates_count_tokens_over_seconds(dense, quick, monkeypatch):
    clock = iter([10.0, 12.0, 20.0])
    monkeypatch.setattr(speed, "_now", lambda device: next(clock))
    assert tokens_per_second(load(dense()), WINDOWS) == (2 * 24 / 2, 2 * 4 / 8)
