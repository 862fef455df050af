"""Experts that are computed together, all neurons for every token: the same model, in less time."""

from types import SimpleNamespace

import pytest
import torch
from hosting import DECODER_TARGETS, hosts
from reference import gap, load
from tiny import FAMILIES

from upcycle.finetune import preparing
from upcycle.finetune.run import finetune
from upcycle.finetune.together import USUAL, pays, run_together
from upcycle.models.blocks import moe_blocks

TOKENS_BL = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(2))
FAMILY_OF = {t: f for f in sorted(FAMILIES, reverse=True) if f != "eurobert" for t in hosts(f)}


def trained_once(folder, *, at_once):
    """Logits, and the gradient of every weight, of a loss in which each token counts otherwise."""
    model = load(folder)
    blocks = moe_blocks(model)
    if at_once:
        run_together(blocks)
        assert all("forward" in vars(block.experts) for block in blocks)
    logits_BLV = model(TOKENS_BL, use_cache=False).logits
    logits_BLV.log_softmax(-1)[..., 7].square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits_BLV.detach(), grads


def assert_alike(found, expected):
    """But for rounding, beside a tensor's largest number; some have none, or zeros alone."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        largest = float(expected[name].abs().max()) if tensor.numel() else 0.0
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-3 * largest)


@pytest.mark.parametrize("target", sorted(DECODER_TARGETS))
def test_they_are_what_the_class_computes_and_so_are_their_gradients(dense, moe, target):
    folder = moe(dense(FAMILY_OF[target]), target=target, experts=8, top_k=3, shared=0)
    (logits, grads), (expected, wanted) = (trained_once(folder, at_once=on) for on in (True, False))
    assert gap(logits, expected) < 1e-4
    assert any("experts" in name and grad.any() for name, grad in grads.items())
    assert_alike(grads, wanted)


@pytest.mark.parametrize(
    ("experts", "top_k", "width", "worth_it"),
    [
        (64, 38, 16, True),  # a split of SmolLM2 with three quarters active
        (64, 12, 24, True),
        (8, 2, 192, False),
        (8, 2, 1024, False),  # few wide experts
        (8, 7, 1024, True),
        (8, 2, 4096, False),  # whole copies
    ],
)
def test_narrow_experts_of_which_many_are_on_run_together(experts, top_k, width, worth_it):
    matrices = SimpleNamespace(down_proj=torch.empty(1, 1, width))
    assert pays(SimpleNamespace(num_experts=experts, top_k=top_k, experts=matrices)) is worth_it


@pytest.mark.parametrize("trait", USUAL)
def test_experts_of_another_kind_run_as_their_class_has_them(dense, moe, trait):
    blocks = moe_blocks(load(moe(dense())))
    for block in blocks:
        setattr(block.experts, trait, not USUAL[trait])
    run_together(blocks)
    assert not any("forward" in vars(block.experts) for block in blocks)


def test_so_do_those_that_gate_in_a_way_of_their_own(dense, moe, monkeypatch):
    blocks = moe_blocks(load(moe(dense())))
    monkeypatch.setattr(type(blocks[0].experts), "_apply_gate", lambda self, x: x)
    run_together(blocks)
    assert not any("forward" in vars(block.experts) for block in blocks)


@pytest.mark.parametrize("settings", [{}, {"lora": 4, "merge": True}], ids=["whole", "low rank"])
def test_training_comes_to_the_same_weights(dense, moe, text, tmp_path, monkeypatch, settings):
    asked = {
        "preset": "heal",
        "data": str(text),
        "steps": 3,
        "seq_len": 32,
        "validation_tokens": 64,
    }
    made = {}
    for name in ("together", "by class"):
        if name == "by class":
            monkeypatch.setattr(preparing, "run_together", lambda blocks: None)
        finetune(str(moe(dense(), experts=8, top_k=3)), tmp_path / name, **asked | settings)
        made[name] = dict(load(tmp_path / name).named_parameters())
    assert_alike(made["together"], made["by class"])
