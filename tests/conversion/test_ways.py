"""A new way of making experts is one class and one registration."""

import re

import pytest
import torch
from reference import dense_logits, gap, load, logits, read_json
from tiny import FAMILIES

import upcycle
from upcycle import UpcycleError
from upcycle.conversion.converted import ConvertedLayer
from upcycle.conversion.ways import WAYS
from upcycle.conversion.ways.copy import Copy
from upcycle.core.rng import generator
from upcycle.core.types import ExpertLayout


class Shuffled(Copy):
    """Copies, each with its neurons in another order: the same function."""

    def make(self, design, inputs):
        made = super().make(design, inputs)
        rng = generator(design.seed, "shuffle", inputs.layer)
        orders = [torch.randperm(inputs.ffn.num_neurons, generator=rng) for _ in made.router_ED]
        layout = ExpertLayout(torch.stack(orders), made.layout.shared_S)
        return ConvertedLayer(made.ffn, layout, made.router_ED, made.origin_F)

    def usage(self, geometry):
        return f"A token uses {geometry.top_k} shuffled copies."


@pytest.fixture
def shuffled(monkeypatch):
    monkeypatch.setitem(WAYS._entries, "shuffled", Shuffled("shuffled"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_way_converts_checks_and_reports_itself(dense, shuffled, tmp_path, family):
    done = upcycle.convert(str(dense(family)), tmp_path / "out", method="shuffled", experts=3)
    found = logits(load(tmp_path / "out"))
    assert gap(found, dense_logits(dense(family))) < 1e-4
    assert done.check.exact_error < 1e-4  # the check knows what to demand of it
    assert done.plan.way.usage(done.plan.design.geometry) == "A token uses 2 shuffled copies."
    assert read_json(tmp_path / "out" / "upcycle.json")["plan"]["method"] == "shuffled"
    down = [p for name, p in load(tmp_path / "out").named_parameters() if "experts.down" in name]
    assert not torch.equal(down[0][0], down[0][1])  # the copies do differ


def test_without_its_registration_it_is_unknown(dense):
    with pytest.raises(UpcycleError, match=re.escape("unknown method 'shuffled'")):
        upcycle.plan(str(dense()), method="shuffled")
