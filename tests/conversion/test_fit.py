"""Fits: what a layer learns is better than what it began with, and every loss, gradient, plan and
target is what its paper or formula says, worked out here naively in float64."""

import math

import pytest
import torch
from reference import naive_hidden, read_json
from tiny import normal
from torch.nn.functional import silu

import upcycle
from upcycle import UpcycleError
from upcycle.conversion.design import bind
from upcycle.conversion.fit import FITS, distillation, prior_approximate, transport
from upcycle.conversion.fit.base import Experts, Lesson, hard_top_k, straight_through_top_k
from upcycle.conversion.fit.learn import Held, learn, said
from upcycle.conversion.plan import CHECK_TOKENS
from upcycle.core.settings import Choice
from upcycle.core.types import DenseFFN, LayerActivations
from upcycle.models.record.conversion import FitPart

D, F, E, K, T = 12, 48, 4, 2, 1300
BATCH = 64
LEARNING = [name for name in FITS if FITS[name].learns]
MATRICES = ("gate_FD", "up_FD", "down_DF")
QUICK = {"transport": {"epochs": 2, "iterations": 10}}
"""Of transport, in whose steps many small ones are hidden."""


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr("upcycle.conversion.fit.learn.BATCH", BATCH)


def make_activations(seed=0, tokens=T):
    """Neurons of which each answers to one of E topics, and tokens of these."""
    topics_ED = torch.linalg.qr(normal(D, E, seed=seed)).Q.T
    topic_F = torch.randperm(F, generator=torch.Generator().manual_seed(seed)) % E
    gate_FD = 2 * topics_ED[topic_F] + normal(F, D, seed=seed + 1) / D**0.5
    ffn = DenseFFN(gate_FD, normal(F, D, seed=seed + 2), normal(D, F, seed=seed + 3), silu)
    x_TD = 2 * topics_ED[torch.arange(tokens) % E] + normal(tokens, D, seed=seed + 4)
    return LayerActivations(ffn, x_TD)


def make_experts(activations, seed=0):
    members_EM = torch.randperm(F, generator=torch.Generator().manual_seed(seed + 5)).view(E, -1)
    return Experts(activations.ffn, members_EM.sort(1).values, normal(E, D, seed=seed + 6) / 4)


def make_weights(tokens=T):
    return normal(tokens, seed=9).exp()


def taught(name, seed=0, *, tokens=T, top_k=K, tell=lambda done, steps: None, **params):
    activations = make_activations(seed, tokens)
    bound = bind(FITS, Choice(name=name, **QUICK.get(name, {}) | params))
    rng = torch.Generator().manual_seed(seed)
    experts, weight_T = make_experts(activations, seed), make_weights(tokens)
    return learn(bound.method, bound.params, experts, activations, weight_T, top_k, rng, tell)


def naive_errors(dense, experts, x_TD, weight_T):
    """Token by token, with 1, 2, … experts on."""
    down_DF, own_DF = dense.down_DF.double(), experts.ffn.down_DF.double()
    h_TF, own_TF = naive_hidden(dense, x_TD), naive_hidden(experts.ffn, x_TD)
    lost, unit = [0.0] * len(experts.experts_EM), 0.0
    for x_D, h_F, own_F, weight in zip(x_TD, h_TF, own_TF, weight_T.tolist(), strict=True):
        logits = experts.router_ED.double() @ x_D.double()
        order = sorted(range(len(logits)), key=lambda e: -float(logits[e]))
        y_D, unit = down_DF @ h_F, unit + weight * float((down_DF @ h_F).square().sum())
        for k in range(len(order)):
            on = torch.cat([experts.experts_EM[e] for e in order[: k + 1]])
            lost[k] += weight * float((own_DF[:, on] @ own_F[on] - y_D).square().sum())
    return [each / unit for each in lost]


# --- any fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FITS)
def test_every_fit_leaves_equal_experts_a_finite_router_and_what_it_does_not_learn(name):
    learned, _ = taught(name)
    start = make_experts(make_activations())
    assert sorted(learned.experts_EM.flatten().tolist()) == list(range(F))
    assert all(row == sorted(row) for row in learned.experts_EM.tolist())
    assert learned.router_ED.isfinite().all()
    assert learned.router_ED.dtype == torch.float32
    changed = {
        "split": not torch.equal(learned.experts_EM, start.experts_EM),
        "router": not torch.equal(learned.router_ED, start.router_ED),
        "weights": any(
            not torch.equal(getattr(learned.ffn, matrix), getattr(start.ffn, matrix))
            for matrix in MATRICES
        ),
    }
    assert {part for part, differs in changed.items() if differs} == set(FITS[name].learns)


@pytest.mark.parametrize("name", ["transport", "distillation"])
def test_a_fit_to_the_output_betters_tokens_that_it_did_not_see(name):
    for seed in range(2):
        learned, part = taught(name, seed, epochs=6)
        assert part.kept
        assert part.error_after < 0.9 * part.error_before
        assert not any(getattr(learned.ffn, matrix).requires_grad for matrix in MATRICES)


@pytest.mark.parametrize("name", LEARNING)
def test_every_fit_depends_on_its_generator_alone_and_touches_nothing(name):
    state = torch.get_rng_state()
    (first, part), (second, same) = taught(name), taught(name)
    assert part == same
    assert torch.equal(first.experts_EM, second.experts_EM)
    assert torch.equal(first.router_ED, second.router_ED)
    assert torch.equal(first.ffn.gate_FD, second.ffn.gate_FD)
    assert torch.equal(torch.get_rng_state(), state)
    activations = make_activations()
    experts, bound = make_experts(activations), bind(FITS, Choice(name=name, epochs=1))
    rng, weight_T = torch.Generator(), make_weights(4 * BATCH)
    some = activations.on(slice(4 * BATCH))
    learn(bound.method, bound.params, experts, some, weight_T, K, rng, lambda *_: None)
    untouched = make_activations()
    assert torch.equal(experts.router_ED, make_experts(untouched).router_ED)
    assert torch.equal(activations.x_TD, untouched.x_TD)
    for matrix in MATRICES:
        assert torch.equal(getattr(activations.ffn, matrix), getattr(untouched.ffn, matrix))


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("held", [True, False])
def test_no_fit_depends_on_chunking(name, monkeypatch, held):
    whole, part = taught(name)
    monkeypatch.setattr("upcycle.core.types.CHUNK_ELEMENTS", 50 * F)
    monkeypatch.setattr("upcycle.core.types.HELD_ELEMENTS", 2**28 if held else 0)
    chunked, again = taught(name)
    assert again.error_after == pytest.approx(part.error_after, rel=1e-3)
    torch.testing.assert_close(chunked.router_ED, whole.router_ED, rtol=1e-2, atol=1e-3)


def test_every_batch_is_whole_and_every_epoch_holds_every_token(monkeypatch):
    monkeypatch.setattr("upcycle.core.types.CHUNK_ELEMENTS", 50 * F)
    activations = make_activations(tokens=6 * BATCH)
    place_T = torch.arange(6 * BATCH).float()
    lesson = Lesson(activations, place_T, 1.0, K, BATCH, torch.Generator())
    batches = list(lesson.batches(2, -place_T))
    assert len(batches) == lesson.steps(2) == 12
    assert {len(row) for batch in batches for row in batch} == {BATCH}
    x_TD, h_TF, weight_T, beside_T = map(torch.cat, zip(*batches, strict=True))
    assert torch.equal(weight_T, place_T.repeat(2))
    assert torch.equal(beside_T, -weight_T)
    assert torch.equal(x_TD, activations.x_TD.repeat(2, 1))
    torch.testing.assert_close(h_TF, activations.ffn.hidden(x_TD))


def test_steps_are_told():
    told = []
    taught("prior_approximate", epochs=2, tell=lambda done, steps: told.append((done, steps)))
    steps = 2 * (T // BATCH - 1)
    assert told == [(done, steps) for done in range(steps + 1)]


def test_what_does_not_help_is_not_kept_unless_it_aims_at_something_else():
    aimed, part = taught("prior_approximate", seed=1, epochs=8)
    assert part.kept
    assert not torch.equal(aimed.router_ED, make_experts(make_activations(1), 1).router_ED)
    learned, part = taught("distillation", rate=100)
    start = make_experts(make_activations())
    assert not part.kept
    assert not part.error_after < part.error_before
    assert torch.equal(learned.router_ED, start.router_ED)
    assert torch.equal(learned.ffn.down_DF, start.ffn.down_DF)


@pytest.mark.parametrize(("tokens", "top_k"), [(2 * BATCH - 1, K), (T, E)])
def test_without_choice_or_text_nothing_is_learned(tokens, top_k):
    learned, part = taught("transport", tokens=tokens, top_k=top_k)
    assert part is None
    assert torch.equal(learned.experts_EM, make_experts(make_activations()).experts_EM)


@pytest.mark.parametrize("weights", [False, True])
def test_errors_are_those_of_1_2_and_all_experts(monkeypatch, weights):
    monkeypatch.setattr("upcycle.core.types.CHUNK_ELEMENTS", 7 * F)
    monkeypatch.setattr("upcycle.conversion.fit.learn.CHUNK_ELEMENTS", 3 * E * D)
    activations = make_activations(tokens=40)
    experts, weight_T = make_experts(activations), make_weights(40)
    if weights:
        changed = experts.ffn.changed(lambda matrix: matrix * 1.1)
        experts = Experts(changed, experts.experts_EM, experts.router_ED)
    expected = naive_errors(activations.ffn, experts, activations.x_TD, weight_T)
    assert Held(activations, weight_T).errors(experts) == pytest.approx(expected, abs=1e-5)
    assert (expected[-1] > 0.01) == weights


def test_the_smallest_k_within_the_budget_is_reported_and_k_stays():
    """The held-out tokens are those that the generator's order has last."""
    activations, tokens = make_activations(), T // BATCH * BATCH - BATCH
    order_T = torch.randperm(T, generator=torch.Generator().manual_seed(0))[tokens:]
    x_TD, weight_T = activations.x_TD[order_T], make_weights()[order_T]
    found = set()
    for budget in (0.9, 0.5, 0.2, 0.001):
        learned, part = taught("distillation", budget=budget)
        errors = naive_errors(activations.ffn, learned, x_TD, weight_T)
        assert part.error_after == pytest.approx(errors[K - 1], rel=1e-4)
        met = [k for k, error in enumerate(errors, 1) if error <= budget]
        assert part.smallest_k == (met[0] if met else None)
        found.add(part.smallest_k)
    assert len(found) > 2
    assert None in found


def part_of(before, after, smallest_k, kept=True):
    return FitPart(
        error_before=before, error_after=after, kept=kept, budget=0.1, smallest_k=smallest_k
    )


def test_what_was_learned_is_said():
    assert said([], 4) == ""
    parts = [part_of(0.5, 0.2, 3), part_of(0.3, 0.2, 5), part_of(0.4, 0.9, None, kept=False)]
    assert said(parts, 2) == (
        "On tokens that it did not see, it brings the layers' error from 0.400 to 0.267 of what "
        "their experts put out (1 of 3 layers stay as they were). To be within 0.1, they would "
        "need 3 to 5 experts per token, in 2 of 3 layers; all have 2."
    )
    assert "would need 3 experts per token; all have 2" in said(parts[:1], 2)
    assert "With no number of experts is it within 0.1; all have 2" in said(parts[2:], 2)


# --- what losses, and their gradients, are ---------------------------------------------------


def first_loss(monkeypatch, module, name, **params):
    """What the loss of a fit is on its first batch, the tensors that follow it with their values
    there, and its gradients by autograd."""
    seen = {}

    def look(rates, batches, loss, steps, tell):
        tensors = [tensor.requires_grad_() for tensor, _ in rates]
        with torch.enable_grad():
            batch = next(iter(batches))
            value = loss(batch)
            gradients = torch.autograd.grad(value, tensors)
        seen.update(batch=batch, value=value.item(), tensors=tensors, gradients=gradients)
        for tensor in tensors:
            tensor.requires_grad_(False)

    monkeypatch.setattr(module, "follow", look)
    activations = make_activations(tokens=BATCH)
    bound = bind(FITS, Choice(name=name, **params))
    rng = torch.Generator().manual_seed(0)
    lesson = Lesson(activations, make_weights(BATCH), 3.0, K, BATCH, rng)
    bound.run(make_experts(activations), lesson, bound.params)
    return seen, activations, [tensor.double().requires_grad_() for tensor in seen["tensors"]]


def naive_straight_through(logits_E):
    """Value and gradient of a token's selection: 1 for the best K, as softmax changes."""
    best = sorted(range(len(logits_E)), key=lambda e: -float(logits_E[e].detach()))[:K]
    soft_E = logits_E.exp() / logits_E.exp().sum()
    hard_E = torch.tensor([float(e in best) for e in range(len(logits_E))]).double()
    return soft_E + (hard_E - soft_E).detach(), hard_E, soft_E


def assert_same(seen, value, leaves):
    assert seen["value"] == pytest.approx(value.item(), rel=1e-4)
    for found, expected in zip(seen["gradients"], torch.autograd.grad(value, leaves), strict=True):
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


def test_distillations_loss_and_gradients_are_autograds_of_loops(monkeypatch):
    seen, activations, leaves = first_loss(monkeypatch, distillation, "distillation")
    router_ED, gate_FD, up_FD, down_DF = leaves
    dense, members_EM = activations.ffn, make_experts(activations).experts_EM
    y_TD = naive_hidden(dense, activations.x_TD) @ dense.down_DF.double().T
    total = 0.0
    for x_D, y_D, weight in zip(
        activations.x_TD.double(), y_TD, make_weights(BATCH).double(), strict=True
    ):
        on_E, _, _ = naive_straight_through(router_ED @ x_D)
        put_D = 0.0
        for e, members in enumerate(members_EM):
            own_M = silu(gate_FD[members] @ x_D) * (up_FD[members] @ x_D)
            put_D = put_D + on_E[e] * (down_DF[:, members] @ own_M)
        total = total + weight * (put_D - y_D).square().sum()
    assert_same(seen, total / BATCH / 3.0, leaves)


def naive_plan(affinity_FE, temperature, iterations=50):
    """Rows and columns scaled in turn, not in the log domain."""
    plan_FE = (affinity_FE / temperature).exp()
    for _ in range(iterations):
        plan_FE = plan_FE / plan_FE.sum(1, keepdim=True)
        plan_FE = plan_FE / plan_FE.sum(0) * (len(plan_FE) / plan_FE.shape[1])
    return plan_FE


def naive_rounding(plan_FE):
    """The largest share of a neuron without an expert, in an expert with room, one by one."""
    plan = plan_FE.detach().clone()
    rounded = torch.zeros_like(plan)
    for _ in range(len(plan)):
        f, e = divmod(int(plan.argmax()), plan.shape[1])
        rounded[f, e], plan[f] = 1, -1
        if rounded[:, e].sum() == len(plan) // plan.shape[1]:
            plan[:, e] = -1
    return rounded


def test_transports_loss_and_gradients_are_autograds_of_loops(monkeypatch):
    seen, activations, leaves = first_loss(
        monkeypatch, transport, "transport", balance=0.3, z=0.1, hottest=0.02
    )
    affinity_FE, router_ED = leaves
    down_DF = activations.ffn.down_DF.double()
    plan_FE = naive_plan(affinity_FE, 0.02)
    held_FE = plan_FE + (naive_rounding(plan_FE) - plan_FE).detach()
    total, busy, likely, z = 0.0, 0.0, 0.0, 0.0
    h_TF = naive_hidden(activations.ffn, activations.x_TD)
    for x_D, h_F, weight in zip(
        activations.x_TD.double(), h_TF, make_weights(BATCH).double(), strict=True
    ):
        logits_E = router_ED @ x_D
        on_E, hard_E, soft_E = naive_straight_through(logits_E)
        missing_D = down_DF @ (h_F - h_F * (held_FE @ on_E))
        total = total + weight * missing_D.square().sum()
        busy, likely = busy + hard_E / BATCH, likely + soft_E / BATCH
        z = z + logits_E.exp().sum().log() ** 2 / BATCH
    balance = E / K * (busy * likely).sum()
    assert_same(seen, total / BATCH / 3.0 + 0.3 * balance + 0.1 * z, leaves)


def test_prior_approximates_loss_and_gradients_are_autograds_of_loops(monkeypatch):
    seen, activations, leaves = first_loss(
        monkeypatch, prior_approximate, "prior_approximate", balance=0.5
    )
    (router_ED,) = leaves
    ffn, members_EM = activations.ffn, make_experts(activations).experts_EM
    down_DF, total = ffn.down_DF.double(), 0.0
    h_TF = naive_hidden(ffn, activations.x_TD)
    for x_D, h_F in zip(activations.x_TD.double(), h_TF, strict=True):
        part_D = down_DF @ h_F * K / E
        errors = [
            float((down_DF[:, own] @ h_F[own] - part_D).square().mean()) for own in members_EM
        ]
        nearest = sorted(range(E), key=lambda e: errors[e])[:K]
        mass = [math.exp(e in nearest) for e in range(E)]
        _, hard_E, soft_E = naive_straight_through(router_ED @ x_D)
        entropy = -sum(mass[e] / sum(mass) * soft_E[e].log() for e in range(E))
        total = total + entropy + 0.5 * (hard_E * soft_E).sum() / E
    assert_same(seen, total / BATCH, leaves)


def test_a_selection_is_hard_and_its_gradient_soft():
    logits_TE = normal(50, E, seed=3).requires_grad_()
    on_TE, weight_TE = straight_through_top_k(logits_TE, K), normal(50, E, seed=4)
    assert torch.equal(on_TE, hard_top_k(logits_TE, K))
    assert on_TE.sum(1).tolist() == [K] * 50
    (found_TE,) = torch.autograd.grad((on_TE * weight_TE).sum(), logits_TE)
    (expected_TE,) = torch.autograd.grad((logits_TE.softmax(1) * weight_TE).sum(), logits_TE)
    torch.testing.assert_close(found_TE, expected_TE)


# --- transport -------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.1, 0.3), (0.1, 0.01)])
def test_a_plan_has_the_margins_of_a_partition_and_is_the_naive_one(temperature, scale):
    affinity_FE = scale * normal(96, 6, seed=1)
    plan_FE = transport.transport(affinity_FE, temperature, 50).exp()
    torch.testing.assert_close(plan_FE.sum(1), torch.ones(96), rtol=0, atol=1e-3)
    torch.testing.assert_close(plan_FE.sum(0), torch.full((6,), 16.0), rtol=0, atol=1e-3)
    expected_FE = naive_plan(affinity_FE.double(), temperature)
    torch.testing.assert_close(plan_FE.double(), expected_FE, rtol=1e-3, atol=1e-5)


def test_a_plan_is_finite_where_exponentials_are_not():
    affinity_FE = 200 * normal(96, 6, seed=1)
    plan_FE = transport.transport(affinity_FE, 0.1, 50)
    assert plan_FE.isfinite().all()
    torch.testing.assert_close(plan_FE.exp().sum(0), torch.full((6,), 16.0), rtol=1e-3, atol=0)


def test_a_plan_is_rounded_to_a_partition_as_one_by_one():
    plan_FE = transport.transport(normal(96, 6, seed=2), 0.5, 50).exp()
    rounded_FE = transport.partition(plan_FE)
    assert rounded_FE.sum(1).tolist() == [1] * 96
    assert rounded_FE.sum(0).tolist() == [16] * 6
    assert torch.equal(rounded_FE, naive_rounding(plan_FE))


def test_balance_is_one_where_all_experts_are_equally_busy_and_more_where_not():
    even_TE = 10 * torch.eye(E)[torch.arange(40) % E]
    assert float(transport.imbalance(even_TE, 1)) == pytest.approx(1)
    one_TE = 100 * torch.eye(E)[torch.zeros(40, dtype=torch.int64)]
    assert float(transport.imbalance(one_TE, 1)) == pytest.approx(E)


def test_transport_finds_the_neurons_that_answer_to_the_same_topic():
    """From noise: most of an expert is of one topic, where a random split has a quarter."""
    learned, _ = taught("transport", epochs=12, rate=0.03)
    topic_F = torch.randperm(F, generator=torch.Generator().manual_seed(0)) % E
    counts = [topic_F[own].bincount(minlength=E).max().item() for own in learned.experts_EM]
    assert sum(counts) / F > 0.55


# --- prior-approximate -----------------------------------------------------------------------


def test_a_perfect_expert_is_the_target():
    """Of four experts on one direction, one puts out just its part of the sum."""
    scale_F = torch.tensor([1.0, 0.0, 3.0, 0.0])
    ffn = DenseFFN(torch.ones(4, D), torch.ones(4, D), scale_F * torch.ones(D, 1), silu)
    activations = LayerActivations(ffn, normal(20, D, seed=1))
    target_TE = prior_approximate.nearest(activations, torch.arange(4)[:, None], 1)
    assert target_TE.tolist() == [[1, 0, 0, 0]] * 20


def test_a_router_learns_which_experts_are_nearest():
    activations = make_activations()
    start = make_experts(activations)
    target_TE = prior_approximate.nearest(activations, start.experts_EM, 1)
    learned, _ = taught("prior_approximate", epochs=8, top_k=1)
    before, after = (
        float((target_TE * hard_top_k(activations.x_TD @ experts.router_ED.T, 1)).sum()) / T
        for experts in (start, learned)
    )
    assert before < 0.3
    assert after > 0.4


# --- in a conversion -------------------------------------------------------------------------

SETTINGS = {
    "experts": 4,
    "top_k": 2,
    "split": "random",
    "router": "normal",
    "compensate": "none",
    "sequential": False,
    "keep_dense": [1],
    "router_spread": 1e-4,
    "calibration": "builtin",
    "calibration_tokens": 512,
    "seq_len": 64,
}


@pytest.fixture(autouse=True)
def short_check(monkeypatch):
    monkeypatch.setitem(CHECK_TOKENS, "fast", 64)


CONVERTED = {
    "a split": {"fit": "transport"},
    "beside shared neurons, refit and in sequence": {
        "fit": "transport", "shared": 0.25, "experts": 6, "compensate": "least_squares",
        "sequential": True,
    },
    "weights": {"fit": "distillation"},
    "weights, beside shared neurons and in sequence": {
        "fit": "distillation", "shared": 0.25, "experts": 6, "sequential": True,
        "compensate": "least_squares",
    },
    "a router": {"fit": "prior_approximate"},
}  # fmt: skip


@pytest.mark.parametrize("settings", CONVERTED.values(), ids=CONVERTED)
def test_what_layers_learn_is_in_the_model_and_its_record(dense, tmp_path, settings):
    told = []
    done = upcycle.convert(
        str(dense()),
        tmp_path / "out",
        progress=lambda stage, *share: told.append(share) if stage == "learning" else None,
        **SETTINGS | settings,
    )
    assert done.check.exact_error < 5e-3
    layers = read_json(tmp_path / "out" / "upcycle.json")["layers"]
    assert [("fit" in layer, layer["dense"]) for layer in layers] == [
        (True, False), (False, True), (True, False)
    ]  # fmt: skip
    assert all(layer["fit"]["error_after"] > 0 for layer in layers if "fit" in layer)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Fit, `{settings['fit']}`" in card
    assert done.learned in card
    assert done.learned.startswith("On tokens that it did not see")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"calibration_tokens": 64}, "64 tokens are less than the 128 that it takes to learn"),
        ({"top_k": 4}, "all experts are on, so that there is nothing to choose"),
    ],
)
def test_a_fit_that_can_learn_nothing_is_said_to_do_so(dense, tmp_path, settings, why):
    done = upcycle.convert(
        str(dense()),
        tmp_path / "out",
        **SETTINGS | {"fit": "transport", "check": "none"} | settings,
    )
    assert f"Nothing was learned: {why}" in (tmp_path / "out" / "README.md").read_text()
    assert any(f"`fit=transport` changes nothing here: {why}" in n for n in done.plan.warnings)


@pytest.mark.parametrize("method", ["copy", "prune", "drop"])
def test_a_fit_goes_with_a_split(dense, method):
    with pytest.raises(UpcycleError, match="`fit=transport` goes with a split"):
        upcycle.plan(str(dense()), method=method, fit="transport")


@pytest.mark.parametrize(
    "wrong", [{"rate": 0}, {"rate": 1e40}, {"epochs": 0}, {"budget": 2}, {"rat": 1}]
)
def test_values_out_of_range_are_rejected(wrong):
    with pytest.raises(UpcycleError, match=next(iter(wrong))):
        taught("distillation", **wrong)
