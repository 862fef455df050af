"""Gating of training: what it selects and weighs, against the classes and against loops."""

from dataclasses import replace

import pytest
import torch
from reference import gap, load, logits, weights

from upcycle.core.binding import bind
from upcycle.core.settings import Choice
from upcycle.finetune.data import Data
from upcycle.finetune.gating import GATINGS
from upcycle.finetune.gating.base import Gater, Numbers, Pass, Route
from upcycle.finetune.gating.soft_to_hard import Fade
from upcycle.finetune.gating.sparse_mixer import near_shares
from upcycle.finetune.plugins import add_up
from upcycle.finetune.router_losses import ROUTER_LOSSES
from upcycle.finetune.router_terms import RouterTerms, Term
from upcycle.finetune.routers import RouterTap, keep_float32, measure_scales, score_of
from upcycle.models.blocks import moe_blocks
from upcycle.models.record.file import Trained, read_record

TOKENS_BL = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(2))
HOSTS = {
    "qwen2_moe": "qwen2", "mixtral": "llama", "glm4_moe": "llama", "granitemoeshared": "granite",
    "ernie4_5_moe": "ernie4_5", "deepseek_v3": "youtu", "laguna": "qwen3", "gemma4": "gemma4_text",
    "lfm2_moe": "lfm2", "nemotron_h": "nemotron_h",
}  # fmt: skip
"""Classes that select and weigh in ways of their own, with families that they host."""
PASS = Pass(seed=0, step=3, progress=0.0, rows=range(3))


def split_model(dense, moe, target, **settings):
    fields = {
        "target": target,
        "shared": 0 if target in ("mixtral", "lfm2_moe", "gemma4") else 0.25,
        "router_spread": 0.05,
    }
    return load(moe(dense(HOSTS[target]), **(fields | settings)))


def gated(model, name, now=PASS, parts=True, **params):
    """The model, routed by a gating while it trains; and the tap that sees it."""
    blocks, score = moe_blocks(model), score_of(model.config)
    scales = measure_scales(model, blocks, TOKENS_BL[:1])
    bound = bind(GATINGS, Choice(name=name, **params))
    gater = Gater(bound, blocks, [scale.spread for scale in scales], score, parts, now)
    return model, RouterTap(blocks, score=score, gate=gater)


def trained_logits(model):
    model.train()
    return logits(model, TOKENS_BL)


# --- the class's own rule ------------------------------------------------------------------------


@pytest.mark.parametrize("target", HOSTS)
def test_the_rule_is_the_classs_own(dense, moe, target):
    """Its selection, its weights and its gradient, also where a bias selects."""
    model = split_model(dense, moe, target)
    blocks, score, seen = moe_blocks(model), score_of(model.config), []
    keep_float32(blocks)  # and bias is no parameter
    for block in blocks:
        if block.selection_bias is not None:
            block.selection_bias.copy_(torch.linspace(-0.01, 0.01, block.num_experts))

    def see(place, logits_TE, chosen_TK, weights_TK):
        seen.append((place, logits_TE, chosen_TK, weights_TK))
        return own(place, logits_TE, chosen_TK, weights_TK).own

    def own(place, logits_TE, chosen_TK, weights_TK):
        numbers = PASS.numbers(place, len(logits_TE))
        return Route(
            blocks[place], score, logits_TE, chosen_TK, weights_TK, 0.05, True, 0.0, numbers
        )

    RouterTap(blocks, score=score, gate=see)
    model.train()(input_ids=TOKENS_BL, use_cache=False)
    assert len(seen) == 3
    for place, logits_TE, chosen_TK, weights_TK in seen:
        gates = own(place, logits_TE, chosen_TK, weights_TK).gates(logits_TE)
        order, other = chosen_TK.argsort(), gates.chosen_TK.argsort()
        assert torch.equal(chosen_TK.gather(1, order), gates.chosen_TK.gather(1, other))
        ours_TK, its_TK = gates.weights_TK.gather(1, other), weights_TK.gather(1, order)
        torch.testing.assert_close(ours_TK, its_TK, rtol=1e-5, atol=1e-7)
        slope_TK = torch.randn(its_TK.shape, generator=torch.Generator().manual_seed(0))
        grads = [
            torch.autograd.grad(
                (w * slope_TK).sum(), blocks[place].router.weight, retain_graph=True
            )
            for w in (ours_TK, its_TK)
        ]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


def test_groups_of_copies_are_selected_whole(dense, moe):
    """As the class does, which picks the best groups first."""
    model = load(moe(dense(), target="glm4_moe", method="copy", experts=4, granularity=2, top_k=2))
    (block, *_) = moe_blocks(model)
    assert block.router.num_group > 1
    with torch.no_grad():
        rows_ED = torch.randn(block.router.weight.shape, generator=torch.Generator().manual_seed(1))
        block.router.weight.copy_(rows_ED * 0.05)
    x_TD = torch.randn(50, rows_ED.shape[1], generator=torch.Generator().manual_seed(2))
    logits_TE = x_TD @ block.router.weight.T
    _, weights_TK, chosen_TK = block.router(x_TD)
    route = Route(
        block, torch.sigmoid, logits_TE, chosen_TK, weights_TK, 1.0, True, 0.0, Numbers([], 0)
    )
    gates = route.gates(logits_TE)
    assert torch.equal(gates.chosen_TK.sort().values, chosen_TK.sort().values)
    plain_TK = logits_TE.sigmoid().topk(2).indices
    assert not torch.equal(plain_TK.sort().values, chosen_TK.sort().values)


# --- when it holds -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GATINGS)
def test_only_training_is_gated_and_by_the_same_numbers_again(dense, moe, name):
    plain = split_model(dense, moe, "glm4_moe")
    model, tap = gated(split_model(dense, moe, "glm4_moe"), name)
    assert torch.equal(logits(model, TOKENS_BL), logits(plain, TOKENS_BL))
    first = trained_logits(model)
    assert gap(first, trained_logits(plain)) > 1e-3
    assert torch.equal(first, trained_logits(model))
    tap.gate.now = replace(PASS, step=4)
    assert torch.equal(first, trained_logits(model)) == (name == "soft_to_hard")


def test_a_sequence_draws_the_same_wherever_it_is(dense, moe):
    model, tap = gated(split_model(dense, moe, "glm4_moe"), "noisy_top_k")
    whole = trained_logits(model)
    for row in range(3):
        tap.gate.now = replace(PASS, rows=[row])
        torch.testing.assert_close(logits(model, TOKENS_BL[row : row + 1]), whole[row : row + 1])


# --- noise and dropout ---------------------------------------------------------------------------


def routed_by(model, tap):
    model.train()
    with tap.recording():
        model(input_ids=TOKENS_BL, use_cache=False)
    return tap.routed


@pytest.mark.parametrize("spread", [1e-4, 0.05])
def test_noise_of_the_logits_spread_selects(dense, moe, spread):
    """Whatever the router's temperature; and it is told to the losses."""
    model = split_model(dense, moe, "qwen2_moe", router_spread=spread)
    model, tap = gated(model, "noisy_top_k", noise=0.5)
    routed, *_ = routed_by(model, tap)
    own_TK = routed.logits_TE.topk(2).indices
    moved = (routed.chosen_TK.sort().values != own_TK.sort().values).any(-1).float().mean()
    assert 0.2 < moved < 0.8
    assert routed.noise_TE.std() == pytest.approx(0.5, rel=0.05)
    assert routed.noise == 0.5
    measured = tap.gate.spreads[0]
    assert spread / 2 < measured < spread * 2
    noisy_TE = routed.logits_TE + measured * routed.noise_TE
    noisy_TK = noisy_TE.topk(2).indices
    assert torch.equal(noisy_TK.sort().values, routed.chosen_TK.sort().values)


@pytest.mark.parametrize("target", ["qwen2_moe", "glm4_moe"])
def test_losses_see_the_noise_that_weighs_the_selected(dense, moe, target):
    """Shares of what the selected experts count; of a tempered router's, at ordinary spread."""
    for spread in (0.05, 1e-4):
        model = split_model(dense, moe, target, router_spread=spread)
        model, tap = gated(model, "noisy_top_k", noise=0.5)
        scales = measure_scales(model, tap.blocks, TOKENS_BL[:1])
        routed = routed_by(model, tap)
        every_BL = torch.ones_like(TOKENS_BL, dtype=torch.bool)
        batch = Data(TOKENS_BL, every_BL, every_BL, torch.zeros(3).long(), torch.arange(3))
        terms = {"cv2": Term(bind(ROUTER_LOSSES, Choice(name="cv2")), 1.0)}
        seen = RouterTerms(terms, tap.blocks, scales, tap.score, 1, 0).seen(routed, batch, 0)[0]
        own_TK, weights_TK = seen.weighing_TE.gather(1, seen.chosen_TK), routed[0].weights_TK
        if spread == 1e-4:
            logits_TE = routed[0].logits_TE / scales[0].spread + routed[0].noise_TE
            weights_TK = tap.score(logits_TE).gather(1, seen.chosen_TK)
        shares = (each / each.sum(-1, keepdim=True) for each in (own_TK, weights_TK))
        torch.testing.assert_close(*shares, rtol=1e-4, atol=1e-5)


def test_dropped_experts_are_not_selected_and_count_nothing(dense, moe):
    """With a drop of 1 − 1/E, about one of E survives; where none does, all do."""
    model = split_model(dense, moe, "glm4_moe")
    routed, *_ = routed_by(*gated(model, "expert_dropout", drop=1 - 1 / 8))
    alive_T = (routed.weights_TK > 0).sum(-1)
    # Of 8 experts, none is left with (7/8)⁸ = 0.34 (all are back), one with 8/8 (7/8)⁷ = 0.39.
    assert (alive_T == 1).float().mean() == pytest.approx(0.39, abs=0.12)
    assert (alive_T == 2).float().mean() == pytest.approx(0.61, abs=0.12)
    few, *_ = routed_by(*gated(split_model(dense, moe, "glm4_moe"), "expert_dropout", drop=0.1))
    own_TK = few.logits_TE.topk(2).indices
    kept = (few.chosen_TK.sort().values == own_TK.sort().values).all(-1).float().mean()
    assert kept == pytest.approx(0.9**2, abs=0.12)


# --- soft to hard --------------------------------------------------------------------------------


def test_a_tempered_split_is_the_dense_model_while_all_experts_run(dense, moe):
    """Whose experts count the same; after `until` the class routes."""
    model = split_model(dense, moe, "qwen2_moe", router_spread=1e-4)
    plain = split_model(dense, moe, "qwen2_moe", router_spread=1e-4)
    model, tap = gated(model, "soft_to_hard", full=0.2, until=0.5)
    assert gap(trained_logits(model), logits(load(dense("qwen2")), TOKENS_BL)) < 1e-2
    assert gap(trained_logits(plain), logits(load(dense("qwen2")), TOKENS_BL)) > 0.1
    tap.gate.now = replace(PASS, progress=0.5)
    assert torch.equal(trained_logits(model), trained_logits(plain))
    assert routed_by(model, tap)[0].chosen_TK.shape[1] == 2


@pytest.mark.parametrize("settings", [
    {"target": "mixtral", "top_k": 2},
    {"target": "qwen2_moe", "top_k": 1},  # whose weights are no share of the selected ones
    {"target": "glm4_moe", "top_k": 2},
])  # fmt: skip
def test_copies_count_as_much_together_however_many_run(dense, moe, settings):
    """They do not add up, as parts of an FFN do."""
    source = dense(HOSTS[settings["target"]])
    expected = logits(load(source), TOKENS_BL)
    model = load(moe(source, method="copy", experts=4, **settings))
    model, tap = gated(model, "soft_to_hard", parts=False, full=0.2, until=0.6)
    for progress in (0.0, 0.4, 0.6):
        tap.gate.now = replace(PASS, progress=progress)
        assert gap(trained_logits(model), expected) < 1e-2


def test_experts_add_up_that_are_parts_of_an_ffn(dense, moe):
    def parts(**settings):
        return add_up(read_record(moe(dense(), **settings) / "upcycle.json"))

    assert parts(split="contiguous")
    assert not parts(split="sharing_inner")  # which gives a neuron to several
    assert not parts(method="copy", experts=4)
    assert not add_up(Trained())


def test_selected_experts_count_what_the_class_lets_them_while_all_run(dense, moe):
    """Also where it multiplies each by a number of its own."""
    model = split_model(dense, moe, "gemma4")
    for block in moe_blocks(model):
        block.around.router.per_expert_scale.data.copy_(torch.linspace(0.5, 2, 8))
    _, tap = gated(model, "soft_to_hard", full=0.5)
    seen = []
    soft = tap.gate

    def see(place, logits_TE, chosen_TK, weights_TK):
        gates = soft(place, logits_TE, chosen_TK, weights_TK)
        seen.append((gates.weights_TK.gather(1, chosen_TK), weights_TK))
        return gates

    tap.gate = see
    trained_logits(model)
    assert len(seen) == 3
    for ours_TK, its_TK in seen:
        torch.testing.assert_close(ours_TK, its_TK, rtol=1e-4, atol=1e-6)


def test_scores_fade_between_full_and_until():
    fade = Fade(full=0.2, until=0.6)
    assert [fade.left(p) for p in (0, 0.2, 0.6, 1)] == [1, 1, 0, 0]
    assert fade.left(0.3) == pytest.approx(0.75)
    stages = Fade(full=0.5, until=0.5)
    assert [stages.left(p) for p in (0.49, 0.5)] == [1, 0]
    with pytest.raises(ValueError, match="full must not be above until"):
        Fade(full=0.6, until=0.5)


def test_soft_routers_learn_from_every_expert(dense, moe):
    """Not so those of the class."""
    grads = {}
    for name in ("soft", "own"):
        model = split_model(dense, moe, "glm4_moe")
        if name == "soft":
            gated(model, "soft_to_hard", full=0.5)
        model.train()(input_ids=TOKENS_BL[:1, :1], use_cache=False).logits.square().sum().backward()
        grads[name] = [block.router.weight.grad for block in moe_blocks(model)]
    assert all((grad_ED.abs().sum(-1) > 0).all() for grad_ED in grads["soft"])
    assert all((grad_ED.abs().sum(-1) > 0).sum() == 2 for grad_ED in grads["own"])


# --- SparseMixer ---------------------------------------------------------------------------------


def test_experts_that_are_near_are_those_of_phimoe():
    every = torch.ones(1, 3, dtype=torch.bool)
    alone = near_shares(torch.tensor([[2.0, 1.0, -1.0]]), every, 0.01)
    torch.testing.assert_close(alone, torch.tensor([[1.0, 0, 0]]))
    pair = near_shares(torch.tensor([[1.0, 0.995, 0.2]]), every, 0.01)
    torch.testing.assert_close(pair, torch.tensor([[0.50125, 0.49875, 0]]), atol=1e-5, rtol=0)
    rest = torch.tensor([[False, True, True]])
    second = near_shares(torch.tensor([[1.0, 0.995, 0.2]]), rest, 0.01)
    torch.testing.assert_close(second, torch.tensor([[0, 1.0, 0]]))


def mixed(logits_TE, jitter=0.3):
    numbers = Numbers([torch.Generator().manual_seed(5)], len(logits_TE))
    chosen_TK = logits_TE.topk(2).indices
    unit_TK = torch.full(chosen_TK.shape, 0.25)
    route = Route(None, None, logits_TE, chosen_TK, unit_TK, 1.0, True, 0.0, numbers)
    bound = bind(GATINGS, Choice(name="sparse_mixer", jitter=jitter))
    return bound.run(route, bound.params)


def test_samples_follow_the_shares_and_a_third_stands_in_for_three_quarters():
    logits_E = torch.tensor([1.2, 1.0, 0.9, -2.0])
    gates = mixed(logits_E.repeat(20000, 1))
    near_E = torch.tensor([True, True, True, False])
    share_E = torch.where(near_E, logits_E.exp(), 0.0)
    share_E = share_E / share_E.sum()
    first_T, weight_T = gates.chosen_TK[:, 0], gates.weights_TK[:, 0] / 0.25
    found_E = first_T.bincount(minlength=4) / len(first_T)
    torch.testing.assert_close(found_E, share_E, atol=0.01, rtol=0)
    assert torch.allclose(weight_T[first_T == 0], share_E[0])
    second = weight_T[first_T == 1]
    full, third = (torch.isclose(second, share_E[1] * part) for part in (1.0, 1 / 3))
    assert (full | third).all()
    assert full.float().mean() == pytest.approx(0.25, abs=0.02)
    assert (gates.chosen_TK[:, 0] != gates.chosen_TK[:, 1]).all()


def test_the_gradient_is_the_shares_own_whatever_the_sample_counts():
    logits_TE = torch.tensor([[1.2, 1.0, 0.9, -2.0]] * 50).requires_grad_()
    gates = mixed(logits_TE)
    slope_TK = torch.randn(gates.weights_TK.shape, generator=torch.Generator().manual_seed(1))
    (gates.weights_TK * slope_TK).sum().backward()
    expected_TE = torch.zeros(50, 4)
    for t in range(50):
        left = torch.ones(4, dtype=torch.bool)
        for k, sel in enumerate(gates.chosen_TK[t].tolist()):
            pi_E = near_shares(logits_TE[t : t + 1].detach(), left[None], 0.3)[0]
            for j in range(4):
                slope = 0.25 * float(slope_TK[t, k]) * pi_E[sel]
                expected_TE[t, j] += slope * (float(j == sel) - pi_E[j])
            left[sel] = False
    torch.testing.assert_close(logits_TE.grad, expected_TE, rtol=1e-4, atol=1e-6)


# --- in the loop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GATINGS)
def test_a_gating_changes_what_is_learnt_and_the_class_not(dense, moe, text, tmp_path, name):
    from upcycle.finetune.run import finetune

    source = moe(dense(), target="glm4_moe", shared=0.25, router_spread=0.05)
    settings = {
        "preset": "specialise", "steps": 1, "seq_len": 32, "batch_size": 2, "micro_batch": 1,
        "validation_tokens": 64, "balance": 0.1, "data": str(text), "keep_best": False,
    }  # fmt: skip
    out = tmp_path / "out"
    done = finetune(str(source), out, gating={"name": name}, **settings)
    before, after = weights(source), weights(done.out)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    assert all(
        not torch.equal(before[n], after[n]) for n in before if n.endswith("mlp.gate.weight")
    )
    assert done.reload_error < 1e-5
    assert done.log[0]["validation"]["loss"] > 0


@pytest.mark.parametrize("name", ["noisy_top_k", "soft_to_hard"])
def test_where_all_experts_are_on_there_is_nothing_to_gate(dense, moe, text, tmp_path, name):
    from upcycle import UpcycleError
    from upcycle.finetune.run import finetune

    source = moe(dense(), target="mixtral", method="copy", experts=2, top_k=2)
    with pytest.raises(UpcycleError, match=f"`gating={name}` changes which .* gets all 2: leave"):
        finetune(str(source), tmp_path / "out", gating={"name": name}, data=str(text))
    assert not list(tmp_path.iterdir())
