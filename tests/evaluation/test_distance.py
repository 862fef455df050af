"""Distances of weights against numpy's on all of them at once."""

import numpy as np
import pytest
import torch

import upcycle.evaluation.distance
from upcycle.evaluation.distance import Meter, remarks

SHAPES = [(40, 30), (17,), (64, 9)]


def make_models(offsets=(0.01, 0.0, 0.03), seed=0):
    """A base's tensors, and each model's: the base's with noise of this size."""
    rng = torch.Generator().manual_seed(seed)
    base = [torch.randn(shape, generator=rng) * (1 + i) for i, shape in enumerate(SHAPES)]
    models = [
        [tensor + offset * torch.randn(tensor.shape, generator=rng) for tensor in base]
        for offset in offsets
    ]
    return base, models


def metered(base, models, part="ffn"):
    meter = Meter(len(models))
    for place, tensor in enumerate(base):
        meter.add(part, tensor, (model[place] for model in models))
    return meter.distances(part)


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
    meter = Meter(len(models))
    meter.add("ffn", base[0], (model[0] for model in models))
    meter.add("rest", base[1], (model[1] for model in models))
    ffn, rest = meter.distances("ffn"), meter.distances("rest")
    assert ffn.to_base[2] == pytest.approx(length([models[2][0] - base[0]]) / length(base[:1]))
    assert rest.to_base[2] == pytest.approx(length([models[2][1] - base[1]]) / length(base[1:2]))


def test_equal_models_and_one_of_other_origin_are_noticed():
    base, (one,) = make_models(offsets=(0.02,))
    other, _ = make_models(seed=5)
    found = metered(base, [base, one, [tensor.clone() for tensor in one], other])
    assert found.to_base[0] == 0
    assert found.between[1][2] == 0
    said = remarks("base", ["first", "second", "third", "fourth"], found)
    assert said[:2] == ["first has the same FFNs as base", "third has the same FFNs as second"]
    assert "fourth is 1.34 of base's length" in said[2]
    assert len(said) == 3


def test_fine_tunes_are_not_remarkable():
    base, models = make_models(offsets=(0.01, 0.05, 0.3))
    assert remarks("base", ["a", "b", "c"], metered(base, models)) == []
