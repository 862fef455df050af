"""Training by somebody else's loop, all weights and an ordinary loss, leaves selections as they
are: a router whose logits hardly differ would be turned over by the first steps."""

import pytest
import torch
from reference import load, selections
from tiny import PLAIN_SPLIT

import upcycle
from upcycle.conversion import run as conversion

WIDE = {"hidden_size": 128, "intermediate_size": 256}
SETTINGS = PLAIN_SPLIT | {
    "experts": 8,
    "top_k": 3,
    "shared": 0,
    "split": "predictability",
    "router": "ridge",
    "calibration_tokens": 2048,
    "seq_len": 64,
    "check": "none",
}
STEPS, BATCH, RATE = 16, 4, 1e-5


def train(model, tokens_BL):
    """Returns the first batch's loss, before and after."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):
        batch_BL = tokens_BL[torch.arange(BATCH * step, BATCH * (step + 1)) % len(tokens_BL)]
        loss = model(input_ids=batch_BL, labels=batch_BL).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    first_BL = tokens_BL[:BATCH]
    with torch.no_grad():
        return losses[0], model(input_ids=first_BL, labels=first_BL).loss.item()


@torch.no_grad()
def selected(model, tokens_BL):
    """Per layer, the sets of experts by token."""
    with selections(model) as seen:
        model(input_ids=tokens_BL)
    return [[set(chosen) for chosen in layer_TK.tolist()] for layer_TK in seen]


def kept(before, after):
    """Share of the selected experts that still are, per layer."""
    return [
        sum(len(old & new) for old, new in zip(*layers, strict=True)) / sum(map(len, layers[0]))
        for layers in zip(before, after, strict=True)
    ]


@pytest.mark.parametrize("target", ["qwen2_moe", "glm4_moe", "mixtral"])
@pytest.mark.parametrize(
    ("spread", "least", "most"), [(0.1, 0.9, 1.0), (1e-4, 0.0, 0.7)], ids=["default", "narrow"]
)
def test_plain_training_leaves_selections(dense, tmp_path, target, spread, least, most):
    settings = SETTINGS | {"target": target, "router_spread": spread}
    plan = upcycle.convert(str(dense(**WIDE)), tmp_path / "out", **settings).plan
    tokens_BL = conversion._tokens(plan, lambda *_: None).fit_BL
    model = load(tmp_path / "out")
    before = selected(model, tokens_BL)
    before_training, after = train(model, tokens_BL)
    assert after < before_training
    for share in kept(before, selected(model, tokens_BL)):
        assert least <= share <= most


def test_the_default_is_the_spread_that_was_measured(dense):
    assert upcycle.plan(str(dense()), compensate="least_squares").design.router_spread == 0.1
