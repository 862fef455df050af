"""Opening a source: its tensors are those that its config asks for."""

import pytest
import torch
from spoiled import assert_refused, edit_weights

from upcycle.models import source
from upcycle.models.opening import open_source


def test_opening_reads_headers_only(dense, monkeypatch):
    monkeypatch.setattr(source.DenseSource, "read", lambda *_: pytest.fail("weights were read"))
    assert open_source(str(dense())).tensors


def test_unused_rotary_buffer_is_dropped(copy):
    folder = copy()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda state: state.update({name: torch.ones(6)}))
    assert name not in open_source(str(folder)).tensors


def test_tensor_of_another_shape(copy):
    folder = copy()
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(folder, lambda state: state.update({name: torch.ones(96, 48)}))
    assert_refused(folder, name, "has shape [96, 48], but config.json asks for [192, 48]")


def test_missing_tensor(copy):
    folder = copy()
    edit_weights(folder, lambda state: state.pop("model.norm.weight"))
    assert_refused(folder, "lacks the tensor model.norm.weight")


def test_unexpected_tensor(copy):
    folder = copy()
    name = "model.layers.0.mlp.gate_proj.bias"
    edit_weights(folder, lambda state: state.update({name: torch.ones(192)}))
    assert_refused(folder, f"holds {name}, which llama does not have: it would be lost")
