"""Losses of routers, against loops in float64 that follow their formulas."""

import math
from types import SimpleNamespace

import pytest
import torch

from upcycle import UpcycleError
from upcycle.core.binding import Bound, bind
from upcycle.core.settings import Choice
from upcycle.finetune.router_losses import ROUTER_LOSSES
from upcycle.finetune.router_losses.adaptive_balance import Adaptive, dropped, next_coefficient
from upcycle.finetune.router_losses.base import Facts, Seen
from upcycle.finetune.router_losses.cv2 import selected
from upcycle.finetune.router_losses.erc import coupling, responses, shaken
from upcycle.finetune.router_losses.separation import Separation, repulsion
from upcycle.finetune.router_terms import Term
from upcycle.finetune.routers import Scale, of_spread, untempered

T, E, K, D, M, NOISE = 23, 6, 2, 5, 3, 0.6
MASK_T = torch.ones(T, dtype=torch.bool)
MASK_T[-4:] = False
TEXT_T = torch.arange(T) % 3
COUNTED = MASK_T.nonzero().flatten().tolist()
WEIGHTS = {"labels": {"experts": ((0, 1), (), (5,))}}
"""Parameters that are not the default ones."""


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CHOSEN_TK = normal(T, E, seed=3).topk(K).indices
NOISE_TE = NOISE * normal(T, E, seed=5)
BLOCK = SimpleNamespace(
    router=SimpleNamespace(weight=normal(E, D, seed=6)),
    first=normal(E, 2 * M, D, seed=7),
    experts=SimpleNamespace(down_proj=normal(E, D, M, seed=8)),
)


def rng():
    return torch.Generator().manual_seed(9)


def seen(logits_TE, *, score=torch.sigmoid, part=slice(None), **changes):
    fields = {
        "logits_TE": logits_TE, "scores_TE": score(logits_TE), "chosen_TK": CHOSEN_TK[part],
        "mask_T": MASK_T[part], "text_T": TEXT_T[part], "texts": 3, "block": BLOCK,
        "scale": Scale(), "rng": rng(), "clean_TE": logits_TE,
        "noise": NOISE,
    }  # fmt: skip
    if "noisy_TE" not in changes:
        fields["noisy_TE"] = logits_TE + NOISE_TE[part].to(logits_TE)
        fields["weighing_TE"] = score(fields["noisy_TE"])
    return Seen(**({"weighing_TE": score(logits_TE)} | fields | changes))


def term(name):
    return Term(bind(ROUTER_LOSSES, Choice(name=name, **WEIGHTS.get(name, {}))), 1.0)


def loss_of(name, what):
    mean = term(name).mean(what)
    return term(name).loss(what if mean is None else mean)


# --- naive ------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def naive_balance(z_TE):
    total = 0.0
    for e in range(E):
        selections = sum(int(CHOSEN_TK[t, k] == e) for t in COUNTED for k in range(K))
        shares = [sigmoid(z_TE[t, e]) / sum(sigmoid(z) for z in z_TE[t]) for t in COUNTED]
        total = total + selections / (len(COUNTED) * K) * sum(shares) / len(COUNTED)
    return E * total


def naive_z_loss(z_TE):
    return sum(sum(z.exp() for z in z_TE[t]).log() ** 2 for t in COUNTED) / len(COUNTED)


def variation(values):
    mean = sum(values) / E
    return sum((v - mean) ** 2 for v in values) / (E - 1) / mean**2


def naive_cv2(z_TE):
    importance, load = [0.0] * E, [0.0] * E
    for t in COUNTED:
        chosen = CHOSEN_TK[t].tolist()
        noisy = [z_TE[t, e] + NOISE_TE[t, e] for e in range(E)]
        total = sum(sigmoid(noisy[e]) for e in chosen)
        for e in chosen:
            importance[e] = importance[e] + sigmoid(noisy[e]) / total
        for e in range(E):
            # Selected if its noise, drawn once more, lifts it over the K-th best of the others.
            others = sorted(
                (noisy[o] for o in range(E) if o != e), key=lambda z: -float(z.detach())
            )
            beyond = (z_TE[t, e] - others[K - 1]) / NOISE
            load[e] = load[e] + (1 + torch.erf(beyond / math.sqrt(2))) / 2
    return variation(importance) + variation(load)


def naive_entropy(z_TE):
    means = [0.0] * E
    for t in COUNTED:
        total = sum(z.exp() for z in z_TE[t])
        for e in range(E):
            means[e] = means[e] + z_TE[t, e].exp() / total / len(COUNTED)
    return math.log(E) + sum(p * p.log() for p in means)


def naive_separation(z_TE):
    terms = []
    for t in COUNTED:
        for e in range(E):
            gap = (sigmoid(z_TE[t, e]) - 0.5).abs()
            near = 0.1**-2 + 2 / 0.1**3 * (0.1 - gap)
            terms.append(near if float(gap.detach()) < 0.1 else 1 / gap**2)
    return sum(terms) / len(terms)


def naive_labels(z_TE):
    terms = [0.0]
    for t in COUNTED:
        own = WEIGHTS["labels"]["experts"][TEXT_T[t]]
        if own:
            scores = [sigmoid(z) for z in z_TE[t]]
            terms.append(-(sum(scores[e] for e in own) / sum(scores)).log())
    return sum(terms) / len(COUNTED)


NAIVE = {
    "balance": naive_balance,
    "adaptive_balance": naive_balance,
    "z_loss": naive_z_loss,
    "cv2": naive_cv2,
    "entropy": naive_entropy,
    "separation": naive_separation,
    "labels": naive_labels,
}


def test_every_loss_has_a_reference():
    assert {*NAIVE, "erc"} == set(ROUTER_LOSSES)


@pytest.mark.parametrize("name", NAIVE)
def test_value_and_gradient_are_those_of_the_formula(name):
    x_TE = normal(T, E, seed=4).float().requires_grad_()
    y_TE = x_TE.detach().double().requires_grad_()
    actual, expected = loss_of(name, seen(x_TE)), NAIVE[name](y_TE)
    actual.backward()
    expected.backward()
    assert actual.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(x_TE.grad.double(), y_TE.grad, rtol=1e-3, atol=1e-5)
    assert x_TE.grad.abs().max() > 1e-3


@pytest.mark.parametrize("name", NAIVE)
def test_parts_of_a_step_add_up_to_its_gradient(name):
    """However unlike the parts are in size and use."""
    whole_TE = normal(T, E, seed=4).requires_grad_()
    loss_of(name, seen(whole_TE)).backward()
    parts = [slice(0, 5), slice(5, T)]
    shares = [float(MASK_T[part].sum() / MASK_T.sum()) for part in parts]
    z_TE, one = whole_TE.detach().requires_grad_(), term(name)
    with torch.no_grad():
        means = [one.mean(seen(z_TE[part], part=part)) for part in parts]
    total = 0.0
    for share, part in zip(shares, parts, strict=True):
        what = seen(z_TE[part], part=part)
        if means[0] is None:
            loss = one.loss(what)
        else:
            step = sum(s * mean for s, mean in zip(shares, means, strict=True))
            loss = one.part(step, one.mean(what))
        (share * loss).backward()
        total += share * float(loss.detach())
    assert total == pytest.approx(float(loss_of(name, seen(whole_TE.detach()))))
    torch.testing.assert_close(z_TE.grad, whole_TE.grad)


@pytest.mark.parametrize("name", NAIVE)
def test_padding_does_not_count(name):
    z_TE = normal(T, E, seed=4)
    other_TE = torch.where(MASK_T[:, None], z_TE, 50.0).requires_grad_()
    loss = loss_of(name, seen(other_TE))
    torch.testing.assert_close(loss, loss_of(name, seen(z_TE)))
    loss.backward()
    assert not other_TE.grad[~MASK_T].any()


# --- what the papers' formulas give where it is known ------------------------------------------


def used(logits_TE, chosen_TK):
    every_T = torch.ones(len(logits_TE), dtype=torch.bool)
    softmax = logits_TE.softmax(-1)
    changes = {"scores_TE": softmax, "weighing_TE": softmax, "noisy_TE": None}
    return seen(logits_TE, chosen_TK=chosen_TK, mask_T=every_T, **changes)


def test_an_even_use_costs_nothing_and_one_expert_alone_the_most():
    even = used(torch.zeros(E, E), torch.arange(E).repeat(K).view(-1, K))
    assert float(loss_of("balance", even)) == pytest.approx(1)
    assert float(loss_of("entropy", even)) == pytest.approx(0, abs=1e-6)
    assert float(loss_of("cv2", even)) == pytest.approx(0, abs=1e-6)
    alone_TE = torch.full((E, E), -1e4)
    alone_TE[:, 0] = 1e4
    collapsed = used(alone_TE, torch.zeros(E, 1, dtype=torch.long))
    assert float(loss_of("balance", collapsed)) == pytest.approx(E)
    assert float(loss_of("entropy", collapsed)) == pytest.approx(math.log(E))
    # Of one 1 among zeros the variance is 1/E, the squared mean 1/E².
    assert float(loss_of("cv2", collapsed)) == pytest.approx(E, rel=1e-4)


def test_the_chance_to_be_selected_is_what_drawing_the_noise_again_gives():
    clean_E, noise_E = normal(E, seed=4), NOISE * normal(E, seed=5)
    draws_ND = NOISE * normal(40000, E, seed=6)
    expected = []
    for e in range(E):
        noisy_NE = (clean_E + noise_E).repeat(len(draws_ND), 1)
        noisy_NE[:, e] = clean_E[e] + draws_ND[:, e]
        expected.append((noisy_NE.topk(K).indices == e).any(-1).double().mean())
    actual_TE = selected(clean_E[None], (clean_E + noise_E)[None], NOISE, K)
    torch.testing.assert_close(actual_TE[0], torch.stack(expected), atol=0.01, rtol=0)


def test_load_is_balanced_only_where_noise_selects():
    z_TE = normal(T, E, seed=4)
    noisy, plain = (loss_of("cv2", seen(z_TE, **c)) for c in ({}, {"noisy_TE": None}))
    assert float(noisy) > float(plain) > 0


def test_separation_rises_and_is_finite_at_the_threshold():
    gap = torch.tensor([0.4, 0.2, 0.11, 0.1, 0.05, 1e-4, 0.0], dtype=torch.float64)
    for side in (1, -1):
        at = (0.5 + side * gap).requires_grad_()
        value = repulsion(at, Separation())
        value.sum().backward()
        assert (value.diff() > 0).all()
        assert value[3].item() == pytest.approx(100)
        assert torch.isfinite(value).all()
        assert at.grad.abs().max().item() == pytest.approx(2000)
        # Away from the threshold, on both sides; on it, upwards.
        assert (at.grad[:-1] * side < 0).all()
        assert at.grad[-1] < 0


def test_the_coefficient_follows_what_would_be_dropped():
    assert dropped(torch.tensor([4, 4, 4, 4]), 1.0) == 0
    assert dropped(torch.tensor([16, 0, 0, 0]), 1.0) == 0.75
    assert dropped(torch.tensor([8, 8, 0, 0]), 1.5) == 0.25
    params = Adaptive(memory=0.9)
    assert next_coefficient(0.01, torch.tensor([5, 5]), params) == pytest.approx(0.009)
    assert next_coefficient(0.0, torch.tensor([9, 0]), params) == pytest.approx(0.1 * 0.01)
    # A share of 1/40 is dropped.
    assert next_coefficient(0.0, torch.tensor([21, 19]), params) == pytest.approx(0.1 * 0.2 / 40)


def test_experts_that_answer_to_their_own_rows_cost_nothing():
    gate_EMD = torch.eye(4)[:, None, :] * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None]
    response_EE = responses(torch.eye(4), gate_EMD)
    torch.testing.assert_close(response_EE, torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    assert float(coupling(response_EE, 1.0)) == 0
    assert float(coupling(response_EE.roll(1, 0), 1.0)) > 0


def test_coupling_is_the_formulas():
    response_EE, alpha, total = normal(E, E, seed=1).abs(), 0.8, 0.0
    for i in range(E):
        for j in range(E):
            if i != j:
                own = alpha * response_EE[i, i]
                total += max(0.0, response_EE[i, j] - own) + max(0.0, response_EE[j, i] - own)
    assert float(coupling(response_EE, alpha)) == pytest.approx(float(total) / E**2)


def test_rows_are_shaken_within_half_the_way_to_the_nearest_one():
    rows_ED = normal(E, D, seed=2)
    moved_ED = shaken(rows_ED, rng())
    for e in range(E):
        nearest = min(float((rows_ED[e] - rows_ED[o]).norm()) for o in range(E) if o != e)
        assert 0 < float((moved_ED[e] - rows_ED[e]).norm()) < nearest / 2
    assert torch.equal(moved_ED, shaken(rows_ED, rng()))
    same_ED = torch.zeros(3, D)
    assert torch.equal(shaken(same_ED, rng()), same_ED)


def test_coupling_moves_routers_and_gates_alone():
    block = SimpleNamespace(
        router=SimpleNamespace(weight=normal(E, D, seed=6).float().requires_grad_()),
        first=normal(E, 2 * M, D, seed=7).float().requires_grad_(),
        experts=BLOCK.experts,
    )
    loss_of("erc", seen(normal(T, E), block=block)).backward()
    assert block.router.weight.grad.any()
    assert block.first.grad[:, :M].any()
    assert not block.first.grad[:, M:].any()


# --- tempered routers ---------------------------------------------------------------------------


def test_tempered_logits_are_seen_at_ordinary_spread_with_their_own_gradient():
    tempered_TE = (normal(T, E).float() * 1e-4).requires_grad_()
    seen_TE = untempered(tempered_TE, Scale(router=1e-4))
    torch.testing.assert_close(seen_TE, tempered_TE.detach() * 1e4)
    loss_of("z_loss", seen(seen_TE)).backward()
    ordinary_TE = (tempered_TE.detach() * 1e4).requires_grad_()
    loss_of("z_loss", seen(ordinary_TE)).backward()
    torch.testing.assert_close(tempered_TE.grad, ordinary_TE.grad)
    assert math.isclose(float(ordinary_TE.detach().std(-1).mean()), 1, rel_tol=0.3)
    assert torch.equal(untempered(tempered_TE, Scale()), tempered_TE)
    torch.testing.assert_close(of_spread(tempered_TE, 1e-4), seen_TE)


# --- where they can't work ------------------------------------------------------------------------


FACTS = Facts(score="softmax", experts=8, top_k=2, texts=2, parts=True, sharded=True)


@pytest.mark.parametrize(
    ("name", "params", "facts", "message"),
    [
        ("separation", {}, {}, "its scores are a softmax"),
        ("separation", {}, {"score": "sigmoid"}, ""),
        ("erc", {}, {}, "with FSDP"),
        ("labels", {}, {"texts": 1}, "there is one text alone"),
        ("labels", {}, {"texts": 3}, "3 texts get no equal parts of 8 experts"),
        ("labels", {}, {}, ""),
        ("labels", {"experts": [[0], [1], [2]]}, {}, "is of 3 texts, but `data` of 2"),
        ("labels", {"experts": [[0], [8]]}, {}, "there is no expert 8 among 8"),
        ("cv2", {}, {}, ""),
    ],
)
def test_refusals(name, params, facts, message):
    bound = bind(ROUTER_LOSSES, Choice(name=name, **params))
    known = Facts(**(FACTS.__dict__ | facts))
    said = bound.method.refusal(known, bound.params)
    assert message in said
    assert bool(said) == bool(message)


def test_a_parameter_that_there_is_not_is_refused():
    with pytest.raises(UpcycleError, match="router loss 'erc' has no parameter 'beta'"):
        bind(ROUTER_LOSSES, Choice(name="erc", beta=1))
    assert isinstance(bind(ROUTER_LOSSES, Choice(name="erc", alpha=0.5)), Bound)
