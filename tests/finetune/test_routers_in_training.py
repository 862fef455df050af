"""Routers in training: their scale, their precision, their gradients."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from reference import load, logits, routers, selected, selections
from torch import nn

from upcycle.conversion.designing import EXACT_SPREAD, SPREAD, UNFITTED_SPREAD
from upcycle.finetune.loop import make_optimizer
from upcycle.finetune.routers import (
    RouterTap,
    Scale,
    keep_float32,
    measure_scales,
    score_of,
    update_bias,
)
from upcycle.finetune.settings import Training
from upcycle.finetune.trainable import freeze_all_but, members, trained
from upcycle.models.blocks import moe_blocks

TARGETS = ["qwen2_moe", "mixtral", "glm4_moe", "granitemoeshared"]
GAIN = {"qwen2_moe": 8, "mixtral": 2, "glm4_moe": 1, "granitemoeshared": 2}
"""What a split into 8 experts of which 2 are on has folded into down_proj."""
TOKENS_BL = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(2))


def split_model(dense, moe, target, spread=1e-4, **overrides):
    """By default with tempered routers."""
    return load(moe(dense(), target=target, shared=0, router_spread=spread), **overrides)


def inputs_of_routers(model):
    """What each router is called with [T, D]."""
    seen = []
    hooks = [
        r.register_forward_hook(lambda _, args, out: seen.append(args[0].flatten(0, -2)))
        for r in routers(model)
    ]
    logits(model, TOKENS_BL)
    for hook in hooks:
        hook.remove()
    return seen


# --- scales ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_scales_of_a_split_are_its_temperature_and_its_gain(dense, moe, target):
    model = split_model(dense, moe, target)
    blocks = moe_blocks(model)
    scales = measure_scales(model, blocks, TOKENS_BL)
    assert len(scales) == len(blocks) == 3
    for block, x_TD, scale in zip(blocks, inputs_of_routers(model), scales, strict=True):
        spread = (x_TD @ block.router.weight.T).std(-1).mean()
        assert scale.router == pytest.approx(spread.item(), rel=1e-3)
        assert 1e-6 < scale.router < 1e-3
        assert scale.down_proj == pytest.approx(GAIN[target], rel=1e-3)


def test_scales_of_copies_with_plain_weights_are_their_temperature_and_one(dense, moe):
    """Which must each count 1."""
    model = load(moe(dense(), target="qwen2_moe", method="copy", experts=4, top_k=1))
    for scale in measure_scales(model, moe_blocks(model), TOKENS_BL):
        assert EXACT_SPREAD / 2 < scale.router < 2 * EXACT_SPREAD
        assert scale.down_proj == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("spread", [UNFITTED_SPREAD, SPREAD])
@pytest.mark.parametrize("target", TARGETS)
def test_the_routers_of_splits_are_left_alone_on_any_text(dense, moe, target, spread):
    model = split_model(dense, moe, target, spread)
    for token in range(16):
        tokens_BL = torch.cat([TOKENS_BL[:1, token::16], torch.full((1, 28), 16 * token)], dim=1)
        scales = measure_scales(model, moe_blocks(model), tokens_BL)
        assert [(scale.router, scale.down_proj) for scale in scales] == [(1, 1)] * 3


@pytest.mark.parametrize("target", ["mixtral", "glm4_moe"])
def test_ordinary_routers_are_left_alone(dense, moe, target):
    model = load(moe(dense(), target=target, method="copy", experts=4))
    with torch.no_grad():
        for block in moe_blocks(model):
            block.router.weight.copy_(torch.randn_like(block.router.weight) * 0.05)
    scales = measure_scales(model, moe_blocks(model), TOKENS_BL)
    assert [(scale.router, scale.down_proj) for scale in scales] == [(1, 1)] * 3
    for block, x_TD, scale in zip(moe_blocks(model), inputs_of_routers(model), scales, strict=True):
        spread = (x_TD @ block.router.weight.T).std(-1).mean()
        assert scale.spread == pytest.approx(spread.item(), rel=1e-3)


def one_step(model, scaled: bool):
    """One step of Adam on next tokens; returns the share of tokens whose experts change, and the
    root mean square of down_proj's change over its own."""
    blocks = moe_blocks(model)
    scales = measure_scales(model, blocks, TOKENS_BL)
    with selections(model) as before:
        logits(model, TOKENS_BL)
    before = [each.sort().values for each in before]
    down = [block.experts.down_proj.detach().clone() for block in blocks]
    known = members(model, blocks, scales if scaled else [Scale()] * len(scales))
    freeze_all_but(model, known, Training())
    settings = Training(train="moe", lr=1e-3, steps=1)
    optimizer = make_optimizer(settings, trained(model, known))
    z_BLV = model(input_ids=TOKENS_BL, use_cache=False).logits
    nn.functional.cross_entropy(z_BLV[:, :-1].flatten(0, 1), TOKENS_BL[:, 1:].flatten()).backward()
    optimizer.step()
    with selections(model) as after:
        logits(model, TOKENS_BL)
    moved = [(a.sort().values != b).any(-1) for a, b in zip(after, before, strict=True)]
    changes = [
        float((block.experts.down_proj - d).norm() / d.norm())
        for block, d in zip(blocks, down, strict=True)
    ]
    return float(moved[0].float().mean()), sum(changes) / len(changes)


def test_matrices_decay_by_the_same_share_and_routers_not_at_all(dense, moe):
    model = split_model(dense, moe, "qwen2_moe")
    blocks = moe_blocks(model)
    scales = measure_scales(model, blocks, TOKENS_BL)
    assert scales[0].down_proj > 2
    known = members(model, blocks, scales)
    freeze_all_but(model, known, Training())
    training = trained(model, known)
    before = [(item, item.parameter.detach().clone()) for item in training]
    settings = Training(train="moe", lr=1e-2, weight_decay=0.1, steps=1)
    optimizer = make_optimizer(settings, training)
    for item in training:
        item.parameter.grad = torch.zeros_like(item.parameter)
    optimizer.step()
    for item, was in before:
        stays = item.member.group == "router" or was.dim() == 1
        share = 1 if stays else 1 - 1e-2 * 0.1
        torch.testing.assert_close(item.parameter.detach(), share * was)


def untemper(model):
    """The same selections by logits of ordinary spread, and experts without the gain."""
    blocks = moe_blocks(model)
    with torch.no_grad():
        for block, scale in zip(blocks, measure_scales(model, blocks, TOKENS_BL), strict=True):
            block.router.weight /= scale.router
            block.experts.down_proj /= scale.down_proj
    return model


@pytest.mark.parametrize("target", ["qwen2_moe", "granitemoeshared"])
def test_a_scaled_step_reroutes_as_a_step_of_an_ordinary_router(dense, moe, target):
    tempered, down = one_step(split_model(dense, moe, target), scaled=True)
    ordinary, ordinary_down = one_step(untemper(split_model(dense, moe, target)), scaled=True)
    unscaled, unscaled_down = one_step(split_model(dense, moe, target), scaled=False)
    assert 0 < ordinary < 0.2
    assert ordinary / 2 < tempered < ordinary * 2
    assert unscaled > 0.7
    assert down == pytest.approx(ordinary_down, rel=0.05)
    assert unscaled_down == pytest.approx(down / GAIN[target], rel=0.05)


# --- gradients -------------------------------------------------------------------------------


def naive_mixture(scores_TE, x_TD, experts):
    y_TD = 0
    for e in range(scores_TE.shape[1]):
        gate_TM, up_TM = (x_TD @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
        h_TM = experts.act_fn(gate_TM) * up_TM
        y_TD = y_TD + scores_TE[:, e, None] * (h_TM @ experts.down_proj[e].T)
    return y_TD


def naive_scores(target, block, x_TD):
    """Of all experts, in the unit of the selected ones' weights; what is constant is detached. As
    in DenseMixer's release, the sum of the selected ones' is constant for the others alone."""
    z_TE = x_TD @ block.router.weight.T
    if target == "glm4_moe":
        return 2 * z_TE.sigmoid()
    scores_TE = z_TE.softmax(-1)
    if target == "qwen2_moe":
        return scores_TE
    top = scores_TE.topk(block.router.top_k)
    total_T1 = top.values.sum(-1, keepdim=True)
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, top.indices, True)
    return torch.where(chosen_TE, scores_TE / total_T1, scores_TE / total_T1.detach())


@pytest.mark.parametrize("target", TARGETS)
def test_dense_router_gradient_is_that_of_all_experts_running(dense, moe, target):
    model = split_model(dense, moe, target)
    (block, *_), (x_TD, *_) = moe_blocks(model), inputs_of_routers(model)
    RouterTap([block], dense_gradient=True, score=score_of(model.config))
    out = block.router(x_TD)
    chosen_TK = selected(out)
    weights_TK = naive_scores(target, block, x_TD).gather(1, chosen_TK)
    y_TD = block.experts(x_TD, chosen_TK, weights_TK)
    grad_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(0))
    y_TD.backward(grad_TD, retain_graph=True)
    actual_ED = block.router.weight.grad.clone()
    gate_up_grad = block.experts.gate_up_proj.grad.clone()
    model.zero_grad()
    naive_mixture(naive_scores(target, block, x_TD), x_TD, block.experts).backward(grad_TD)
    expected_ED = block.router.weight.grad
    torch.testing.assert_close(actual_ED, expected_ED, rtol=1e-3, atol=1e-4 * expected_ED.std())
    # The experts themselves learn from their own tokens alone.
    model.zero_grad()
    type(block.experts).forward(block.experts, x_TD, chosen_TK, weights_TK).backward(grad_TD)
    torch.testing.assert_close(gate_up_grad, block.experts.gate_up_proj.grad)


@pytest.mark.parametrize("target", ["glm4_moe", "mixtral", "qwen2_moe"])
def test_dense_router_gradient_of_renormalised_copies(dense, moe, target):
    """The same, of targets that renormalise because they are told to, and of one expert a token."""
    top_k = 1 if target == "mixtral" else 2
    settings = {"method": "copy", "experts": 4, "top_k": top_k, "allow_frozen_router": True}
    model = load(moe(dense(), target=target, **settings))
    (block, *_), (x_TD, *_) = moe_blocks(model), inputs_of_routers(model)
    for parameter in block.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    RouterTap([block], dense_gradient=True, score=score_of(model.config))
    chosen_TK = selected(block.router(x_TD))
    z_TE = x_TD @ block.router.weight.T
    scores_TE = z_TE.sigmoid() if target == "glm4_moe" else z_TE.softmax(-1)
    total_T1 = scores_TE.gather(1, chosen_TK).sum(-1, keepdim=True)
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, chosen_TK, True)
    naive_TE = torch.where(chosen_TE, scores_TE / total_T1, scores_TE / total_T1.detach())
    y_TD = block.experts(x_TD, chosen_TK, naive_TE.gather(1, chosen_TK))
    grad_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(0))
    y_TD.backward(grad_TD, retain_graph=True)
    actual_ED = block.router.weight.grad.clone()
    model.zero_grad()
    naive_mixture(naive_TE, x_TD, block.experts).backward(grad_TD)
    expected_ED = block.router.weight.grad
    assert expected_ED.std() > 0
    torch.testing.assert_close(actual_ED, expected_ED, rtol=1e-3, atol=1e-4 * expected_ED.std())


def test_dense_router_gradient_of_experts_without_gates(dense, moe):
    model = load(moe(dense("nemotron_h"), shared=0, router_spread=1e-4))
    (block, *_), (x_TD, *_) = moe_blocks(model), inputs_of_routers(model)
    RouterTap([block], dense_gradient=True, score=score_of(model.config))
    chosen_TK = selected(block.router(x_TD))
    weights_TE = 2 * (x_TD @ block.router.weight.T).sigmoid()
    y_TD = block.experts(x_TD, chosen_TK, weights_TE.gather(1, chosen_TK))
    grad_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(0))
    y_TD.backward(grad_TD, retain_graph=True)
    actual_ED = block.router.weight.grad.clone()
    model.zero_grad()
    both = zip(block.experts.up_proj, block.experts.down_proj, strict=True)
    each_TD = [(x_TD @ up_MD.T).relu() ** 2 @ down_DM.T for up_MD, down_DM in both]
    sum(w_T[:, None] * y for w_T, y in zip(weights_TE.T, each_TD, strict=True)).backward(grad_TD)
    expected_ED = block.router.weight.grad
    assert expected_ED.std() > 0
    torch.testing.assert_close(actual_ED, expected_ED, rtol=1e-3, atol=1e-4 * expected_ED.std())


def test_dense_router_gradient_of_experts_with_scales(dense, moe):
    """Gemma 4's, by which weights are multiplied at last: they learn as the router does."""
    model = load(moe(dense("gemma4_text"), target="gemma4", shared=0, router_spread=1e-4))
    (block, *_), (x_TD, *_) = moe_blocks(model), inputs_of_routers(model)
    scale_E = block.around.router.per_expert_scale
    scale_E.data.copy_(torch.linspace(0.5, 2, 8))
    RouterTap([block], dense_gradient=True, score=score_of(model.config))
    x_TD = x_TD.detach()

    def naive_TE():
        scores_TE = naive_scores("mixtral", SimpleNamespace(router=router), x_TD)
        return scores_TE * scale_E

    router = SimpleNamespace(weight=block.router.weight, top_k=2)
    chosen_TK = block.router(x_TD).topk(2).indices
    y_TD = block.experts(x_TD, chosen_TK, naive_TE().gather(1, chosen_TK))
    grad_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(0))
    learnt = [block.router.weight, scale_E]
    actual = torch.autograd.grad(y_TD, learnt, grad_TD)
    expected = torch.autograd.grad(naive_mixture(naive_TE(), x_TD, block.experts), learnt, grad_TD)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.std())


def test_dense_router_gradient_changes_no_output(dense, moe):
    plain, tapped = (split_model(dense, moe, "qwen2_moe") for _ in range(2))
    RouterTap(moe_blocks(tapped), dense_gradient=True)
    assert torch.equal(logits(plain), logits(tapped))


@pytest.mark.parametrize("dense_gradient", [False, True])
def test_gradient_checkpointing_records_and_learns_the_same(dense, moe, dense_gradient):
    results = []
    for checkpointing in (False, True):
        model = split_model(dense, moe, "qwen2_moe").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tap = RouterTap(moe_blocks(model), dense_gradient)
        with tap.recording():
            z_BLV = model(input_ids=TOKENS_BL, use_cache=False).logits
        model(input_ids=TOKENS_BL[:1], use_cache=False)  # not recorded
        loss = z_BLV.logsumexp(-1).mean()
        loss = loss + sum(r.logits_TE.square().sum() for r in tap.routed) * 1e6
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.numel()]
        results.append((loss.detach(), tap.routed, grads))
    (loss, routed, grads), (other_loss, other_routed, other_grads) = results
    assert torch.equal(loss, other_loss)
    assert len(routed) == len(other_routed) == 3
    for one, other in zip(routed, other_routed, strict=True):
        assert torch.equal(one.logits_TE, other.logits_TE)
        assert torch.equal(one.chosen_TK, other.chosen_TK)
    for one, other in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(one, other)


def test_recorded_logits_are_the_routers_own(dense, moe):
    model = split_model(dense, moe, "granitemoeshared")
    blocks = moe_blocks(model)
    tap = RouterTap(blocks)
    with tap.recording():
        logits(model, TOKENS_BL)
    for block, x_TD, routed in zip(blocks, inputs_of_routers(model), tap.routed, strict=True):
        torch.testing.assert_close(routed.logits_TE, x_TD @ block.router.weight.T)
        top_TK = routed.logits_TE.topk(2).indices
        assert torch.equal(top_TK.sort().values, routed.chosen_TK.sort().values)
        assert routed.weights_TK.sum(-1).allclose(torch.ones(len(x_TD)))


# --- precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("how", ["bfloat16 weights", "autocast"])
def test_routers_hold_and_select_in_float32(dense, moe, target, how):
    weights = how == "bfloat16 weights"
    model = split_model(dense, moe, target, dtype=torch.bfloat16 if weights else torch.float32)
    blocks = moe_blocks(model)
    keep_float32(blocks)
    seen = []
    for block in blocks:
        assert block.router.weight.dtype == torch.float32
        block.router.register_forward_hook(lambda r, args, out: seen.append((r, args[0], out)))
    with torch.autocast("cpu", torch.bfloat16, enabled=not weights):
        logits(model, TOKENS_BL)
    assert len(seen) == 3
    for router, x, out in seen:
        exact_TE = nn.functional.linear(x.float().flatten(0, -2), router.weight)
        # Scores of a tempered router are so close that some are equal after rounding.
        scores_TE = exact_TE if target == "granitemoeshared" else score_of(model.config)(exact_TE)
        top_TK = scores_TE.topk(2).indices
        assert torch.equal(selected(out).sort().values, top_TK.sort().values)
        weights_TK, *_ = (t for t in out if t.is_floating_point() and t.shape[-1] == 2)
        assert weights_TK.dtype == torch.float32


# --- selection bias --------------------------------------------------------------------------


def test_bias_moves_towards_the_experts_with_less_than_their_share(dense, moe):
    (block, *_) = moe_blocks(split_model(dense, moe, "glm4_moe"))
    assert not block.selection_bias.any()
    update_bias(block, torch.tensor([5, 0, 2, 2, 2, 2, 2, 1]), 0.25)
    assert block.selection_bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0, 0.25]


@pytest.mark.parametrize(
    ("spread", "rate"), [(1e-4, 0.001), (UNFITTED_SPREAD, 0.001), (SPREAD, 0.002), (1.0, 0.02)]
)
def test_bias_updates_even_out_the_load(dense, moe, spread, rate):
    model = split_model(dense, moe, "glm4_moe", spread)
    blocks = moe_blocks(model)
    scales = measure_scales(model, blocks, TOKENS_BL)

    def uneven():
        with selections(model) as seen:
            logits(model, TOKENS_BL)
        counts = [each.flatten().bincount(minlength=8) for each in seen]
        return counts, sum(float(c.max() / c.float().mean()) for c in counts) / 3

    _, before = uneven()
    for _ in range(30):
        counts, _ = uneven()
        for block, scale, count_E in zip(blocks, scales, counts, strict=True):
            update_bias(block, count_E, rate * scale.bias)
    assert uneven()[1] < 1 + (before - 1) / 2


def test_only_glm_has_a_selection_bias(dense, moe):
    blocks = itertools.chain.from_iterable(
        moe_blocks(split_model(dense, moe, t)) for t in ("qwen2_moe", "mixtral")
    )
    assert all(block.selection_bias is None for block in blocks)
