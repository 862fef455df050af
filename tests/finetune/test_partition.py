"""Neurons of a split that are dealt out anew while everything they compute stays."""

import pytest
import torch
from reference import gap, load, logits, weights

from upcycle import UpcycleError
from upcycle.core.transport import transport
from upcycle.finetune.partition import AFFINITY, Dealer, add_affinities
from upcycle.finetune.preparing import Watch
from upcycle.finetune.routers import RouterTap, score_of
from upcycle.finetune.run import finetune
from upcycle.models.blocks import moe_blocks

TOKENS_BL = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(2))
HOSTS = {
    "qwen2_moe": "llama", "mixtral": "llama", "glm4_moe": "llama", "nemotron_h": "nemotron_h",
    "gemma4": "gemma4_text",
}  # fmt: skip


def split_model(dense, moe, target, **overrides):
    settings = {"target": target, "shared": 0, "router_spread": 0.05} | overrides
    return moe(dense(HOSTS[target]), **settings)


def dealt(folder):
    model = load(folder)
    blocks = moe_blocks(model)
    add_affinities(blocks)
    model.requires_grad_(False)
    for block in blocks:
        getattr(block.experts, AFFINITY).requires_grad_(True)
        block.router.weight.requires_grad_(True)
    dealer = Dealer(blocks, score_of(model.config))
    RouterTap(blocks, score=score_of(model.config), gate=dealer)
    return model, dealer


def neurons(folder):
    """Each block's neurons, as rows of all their weights in an order of their own."""
    found = []
    for block in moe_blocks(load(folder)):
        down_EMD = block.experts.down_proj.transpose(1, 2)
        first = block.first.split(down_EMD.shape[1], dim=1)
        rows = torch.cat([*first, down_EMD], dim=2).flatten(0, 1)
        found.append(rows[rows[:, 0].argsort()])
    return found


# --- the model while it learns --------------------------------------------------------------------


@pytest.mark.parametrize("target", HOSTS)
def test_nothing_changes_until_neurons_move_and_then_the_class_computes_the_same(
    dense, moe, target
):
    source = split_model(dense, moe, target)
    expected = logits(load(source), TOKENS_BL)
    model, dealer = dealt(source)
    for mode in (model.train, model.eval):
        mode()
        assert gap(logits(model, TOKENS_BL), expected) < 1e-4
    for block in dealer.blocks:
        affinity = getattr(block.experts, AFFINITY)
        noise = torch.randn(affinity.shape, generator=torch.Generator().manual_seed(block.layer))
        affinity.data.add_(noise)
    moved = logits(model, TOKENS_BL)
    assert gap(moved, expected) > 0.05
    dealer.settle()
    assert gap(logits(model, TOKENS_BL), moved) < 1e-4
    assert {*model.state_dict()} == {*load(source).state_dict()}


def test_gradients_are_those_of_all_experts_running_straight_through(dense, moe):
    """Of the share that a neuron counts, and of what experts count."""
    model, dealer = dealt(split_model(dense, moe, "glm4_moe"))
    block, x_TD = dealer.blocks[0], torch.randn(5, 48, generator=torch.Generator().manual_seed(4))
    model.train()
    _, weights_TK, chosen_TK = block.router(x_TD)
    y_TD = block.experts(x_TD, chosen_TK, weights_TK)
    slope_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(5))
    y_TD.backward(slope_TD)
    affinity = getattr(block.experts, AFFINITY)
    leaf_FE, rows_ED = (each.detach().clone().requires_grad_() for each in (
        affinity, block.router.weight
    ))  # fmt: skip
    owner_F = torch.arange(8).repeat_interleave(24)
    experts, total = block.experts, 0.0
    plan_FE = transport(leaf_FE, 1.0, 50).exp()
    counts_TE = 2 * (x_TD @ rows_ED.T).sigmoid()
    for t in range(5):
        for f in range(192):
            e, m = int(owner_F[f]), f % 24
            gate, up = (experts.gate_up_proj[e, i] @ x_TD[t] for i in (m, 24 + m))
            out = torch.nn.functional.silu(gate) * up * (experts.down_proj[e, :, m] @ slope_TD[t])
            held_E = torch.nn.functional.one_hot(owner_F[f], 8) + plan_FE[f] - plan_FE[f].detach()
            on_E = torch.zeros(8).scatter(0, chosen_TK[t], weights_TK[t].detach())
            on_E = on_E + counts_TE[t] - counts_TE[t].detach()
            total = total + out * (held_E @ on_E)
    total.backward()
    torch.testing.assert_close(affinity.grad, leaf_FE.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(block.router.weight.grad, rows_ED.grad, rtol=1e-3, atol=1e-5)
    assert affinity.grad.abs().max() > 1e-4


# --- in the loop ----------------------------------------------------------------------------------


QUICK = {
    "preset": "dot-moe-alignment", "steps": 12, "seq_len": 32, "batch_size": 2,
    "validation_tokens": 64, "lr": 0.05, "next_token": 0.0, "keep_best": False,
}  # fmt: skip


def test_neurons_move_so_that_the_model_predicts_as_the_dense_one(dense, moe, text, tmp_path):
    source = split_model(dense, moe, "qwen2_moe", shared=0.25)
    done = finetune(str(source), tmp_path / "out", data=str(text), **QUICK)
    assert done.after["kl"] < done.before["kl"] * 0.97
    before, after = weights(source), weights(done.out)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(".mlp.gate." in name or ".mlp.experts." in name for name in changed)
    for one, other in zip(neurons(source), neurons(done.out), strict=True):
        assert torch.equal(one, other)
    moved = [n for n in changed if ".experts." in n]
    assert len(moved) > 3 * 8
    assert done.reload_error < 1e-5
    assert done.groups["which neuron is whose"] == {
        "parameters": 3 * 128 * 8,
        "trained": 3 * 128 * 8,
    }


def test_interrupted_and_resumed_is_the_same_as_never_stopped(dense, moe, text, tmp_path):
    source = split_model(dense, moe, "glm4_moe")
    settings = QUICK | {"steps": 5, "validate_every": 2, "keep_best": True, "data": str(text)}

    def stop(row, done, total):
        if row["step"] == 3 and "validation" not in row:
            raise KeyboardInterrupt

    whole = finetune(str(source), tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        finetune(str(source), tmp_path / "out", watch=Watch(row=stop), **settings)
    resumed = finetune(str(source), tmp_path / "out", resume=True, **settings)
    files = (each.out / "model.safetensors" for each in (whole, resumed))
    assert len({path.read_bytes() for path in files}) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": 2}, "`lora=2` does not go with `train=partition`"),
        ({"gating": "noisy_top_k"}, "`gating=noisy_top_k` does not go with `train=partition`"),
        ({"dense_router_gradient": True}, "`dense_router_gradient=True` does not go with"),
    ],
)
def test_what_runs_experts_otherwise_is_refused(dense, moe, tmp_path, settings, message):
    with pytest.raises(UpcycleError, match=message):
        finetune(str(split_model(dense, moe, "glm4_moe")), tmp_path / "out", **QUICK, **settings)
    assert not list(tmp_path.iterdir())


def test_copies_keep_their_neurons(dense, moe, tmp_path):
    source = moe(dense(), target="mixtral", method="copy", experts=4)
    with pytest.raises(UpcycleError, match="was made by copy: give `train=moe`"):
        finetune(str(source), tmp_path / "out", **QUICK)
    assert not list(tmp_path.iterdir())
