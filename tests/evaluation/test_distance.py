"""Distances of weights against numpy's on all of them at once."""

import json

import numpy as np
import pytest
import torch

import upcycle.evaluation.distance
from upcycle.evaluation.distance import Meter, remarks

SHAPES = [(40, 30), (17,), (64, 9)]
NAMES = ["first", "second", "third", "fourth"]


def make_models(offsets=(0.01, 0.0, 0.03), seed=0):
    """A base's tensors, and each model's: the base's with noise of this size."""
    rng = torch.Generator().manual_seed(seed)
    base = [torch.randn(shape, generator=rng) * (1 + i) for i, shape in enumerate(SHAPES)]
    models = [
        [tensor + offset * torch.randn(tensor.shape, generator=rng) for tensor in base]
        for offset in offsets
    ]
    return base, models


def metered(base, models):
    meter = Meter(NAMES[: len(models)])
    for place in range(len(base)):
        see(meter, "ffn", place, base, models)
        meter.close()
    return meter.distances("ffn")


def see(meter, part, place, base, models):
    for name, model in zip(NAMES, models, strict=False):
        meter.see(part, f"tensor {place}", name, base[place], model[place])


def length(tensors):
    return np.linalg.norm(np.concatenate([t.double().numpy().ravel() for t in tensors]))


def difference(one, other):
    return [a.double() - b.double() for a, b in zip(one, other, strict=True)]


def test_distances_are_lengths_of_differences_over_the_bases():
    base, models = make_models()
    found = metered(base, models)
    for i, model in enumerate(models):
        expected = length(difference(model, base)) / length(base)
        assert found.to_base[i] == pytest.approx(expected, rel=1e-6)
        for j, other in enumerate(models):
            expected = length(difference(model, other)) / length(base)
            assert found.between[i][j] == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_large_tensors_are_sampled_for_the_distances_between_models(monkeypatch):
    monkeypatch.setattr(upcycle.evaluation.distance, "SAMPLED", 200)
    base, models = make_models()
    found, whole = metered(base, models), length(difference(models[0], models[2])) / length(base)
    assert found.between[0][2] == pytest.approx(whole, rel=0.1)
    assert found.between[0][2] != pytest.approx(whole, rel=1e-6)
    assert found.to_base[2] == pytest.approx(
        length(difference(models[2], base)) / length(base), rel=1e-6
    )


def test_parts_are_added_up_apart():
    base, models = make_models()
    meter = Meter(NAMES[:3])
    see(meter, "ffn", 0, base, models)
    see(meter, "rest", 1, base, models)
    ffn, rest = meter.distances("ffn"), meter.distances("rest")
    assert ffn.to_base[2] == pytest.approx(length([models[2][0] - base[0]]) / length(base[:1]))
    assert rest.to_base[2] == pytest.approx(length([models[2][1] - base[1]]) / length(base[1:2]))


def test_what_several_meters_saw_is_added_up():
    """As of the layers of a run that was stopped in between."""
    base, models = make_models()
    whole = Meter(NAMES[:3])
    for place in range(len(base)):
        meter = Meter(NAMES[:3])
        see(meter, "ffn", place, base, models)
        whole.add(json.loads(json.dumps(meter.plain())))
    assert whole.distances("ffn") == metered(base, models)


def test_a_model_counts_once_and_others_not_at_all():
    base, models = make_models()
    meter = Meter(NAMES[:2])
    assert meter.awaits("ffn", "tensor 0", "first")
    for _ in range(2):
        see(meter, "ffn", 0, base, models)
    assert not meter.awaits("ffn", "tensor 0", "first")
    assert not meter.awaits("ffn", "tensor 1", "base")
    expected = length([models[0][0] - base[0]]) / length(base[:1])
    assert meter.distances("ffn").to_base == [pytest.approx(expected, rel=1e-6), 0]


def test_a_model_that_was_not_seen_is_the_base():
    base, models = make_models()
    meter = Meter(NAMES[:2])
    meter.see("ffn", "tensor 0", "first", base[0], models[0][0])
    meter.close()
    found = meter.distances("ffn")
    assert found.to_base[1] == 0
    assert found.between[0][1] == pytest.approx(found.to_base[0], rel=1e-6)


@pytest.mark.parametrize("rows", [30, 50])
def test_of_a_vocabulary_that_grew_the_common_rows_count(rows):
    base, models = make_models()
    tensor = torch.cat([models[0][0], torch.ones(20, 30)])[:rows]
    meter = Meter(NAMES[:1])
    meter.see("rest", "embeddings", "first", base[0], tensor)
    common = min(rows, 40)
    expected = length([models[0][0][:common] - base[0][:common]]) / length(base[:1])
    assert meter.distances("rest").to_base[0] == pytest.approx(expected, rel=1e-6)


def test_equal_models_and_one_of_other_origin_are_noticed():
    base, (one,) = make_models(offsets=(0.02,))
    other, _ = make_models(seed=5)
    found = metered(base, [base, one, [tensor.clone() for tensor in one], other])
    assert found.to_base[0] == 0
    assert found.between[1][2] == 0
    said = remarks("base", NAMES, found)
    assert said[:2] == ["first has the same FFNs as base", "third has the same FFNs as second"]
    assert "fourth is 1.34 of base's length" in said[2]
    assert len(said) == 3


def test_fine_tunes_are_not_remarkable():
    base, models = make_models(offsets=(0.01, 0.05, 0.3))
    assert remarks("base", ["a", "b", "c"], metered(base, models)) == []
