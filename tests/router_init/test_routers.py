"""Every router is E finite rows; each is what its paper or formula says, worked out in loops."""

from itertools import permutations

import numpy as np
import pytest
import torch
from reference import naive_hidden
from tiny import normal
from torch.nn.functional import silu

from upcycle.conversion.design import bind
from upcycle.core.errors import UpcycleError
from upcycle.core.settings import Choice
from upcycle.core.types import DenseFFN, LayerActivations
from upcycle.router_init import ROUTERS
from upcycle.router_init.low_rank import truncated
from upcycle.router_init.representative import representatives
from upcycle.router_init.ridge import expert_energies

D, F, E, T = 24, 64, 4, 130
FITTED = [name for name in ROUTERS if ROUTERS[name].needs_activations]
FROM_WEIGHTS = [name for name in ROUTERS if not ROUTERS[name].needs_activations]


BLIND = ("normal", "random", "uniform_random")
"""Routers that know nothing of experts and tokens."""


def make_activations(tokens=T):
    gate_FD, up_FD = normal(2, F, D, seed=0) / D**0.5
    down_DF = normal(D, F, seed=1) * torch.linspace(0.3, 3, F)
    return LayerActivations(DenseFFN(gate_FD, up_FD, down_DF, silu), normal(tokens, D, seed=2))


def make_experts():
    return torch.randperm(F, generator=torch.Generator().manual_seed(3)).view(E, -1)


def route(name, activations, experts_EM, *, seed=4, **params):
    rng = torch.Generator().manual_seed(seed)
    return ROUTERS[name].run(
        activations, experts_EM, bind(ROUTERS, Choice(name=name, **params)).params, rng
    )


def naive_energies(activations, experts_EM):
    """Loops over tokens, experts and their neurons."""
    h_TF = naive_hidden(activations.ffn, activations.x_TD).numpy()
    down_DF = activations.ffn.down_DF.double().numpy()
    energy_TE = np.zeros((len(h_TF), len(experts_EM)))
    for t in range(len(h_TF)):
        for e, members in enumerate(experts_EM.tolist()):
            energy_TE[t, e] = sum(np.sum((h_TF[t, i] * down_DF[:, i]) ** 2) for i in members)
    return energy_TE


def normal_equations(x_TD, y_TE, strength):
    """Ridge of y, centred over experts, on x; [E, D]."""
    x_TD = x_TD.double().numpy()
    y_TE = y_TE - y_TE.mean(axis=1, keepdims=True)
    xx_DD = x_TD.T @ x_TD
    penalty = strength * np.trace(xx_DD) / len(xx_DD)
    weight_DE = np.linalg.solve(xx_DD + penalty * np.eye(len(xx_DD)), x_TD.T @ y_TE)
    return torch.from_numpy(weight_DE.T).float()


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_has_one_finite_float32_row_per_expert(name):
    router_ED = route(name, make_activations(), make_experts())
    assert router_ED.shape == (E, D)
    assert router_ED.dtype == torch.float32
    assert router_ED.isfinite().all()
    assert len({tuple(row) for row in router_ED.tolist()}) == E


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_depends_on_its_generator_alone(name):
    state = torch.get_rng_state()
    first, second = (route(name, make_activations(), make_experts()) for _ in "ab")
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ROUTERS)
def test_no_router_touches_its_input(name):
    activations, experts_EM = make_activations(), make_experts()
    route(name, activations, experts_EM)
    untouched = make_activations()
    assert torch.equal(experts_EM, make_experts())
    assert torch.equal(activations.x_TD, untouched.x_TD)
    for matrix in ("gate_FD", "up_FD", "down_DF"):
        assert torch.equal(getattr(activations.ffn, matrix), getattr(untouched.ffn, matrix))


@pytest.mark.parametrize("name", ROUTERS)
def test_no_router_depends_on_chunking(name, monkeypatch):
    whole_ED = route(name, make_activations(), make_experts())
    monkeypatch.setattr("upcycle.core.types.CHUNK_ELEMENTS", 7 * F)
    torch.testing.assert_close(
        route(name, make_activations(), make_experts()), whole_ED, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in BLIND])
def test_rows_follow_their_experts(name):
    """Experts in another order mean the same rows in that order."""
    order = torch.tensor([2, 0, 3, 1])
    experts_EM = make_experts()
    router_ED = route(name, make_activations(), experts_EM)
    reordered_ED = route(name, make_activations(), experts_EM[order])
    torch.testing.assert_close(reordered_ED, router_ED[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FROM_WEIGHTS)
def test_routers_from_weights_need_no_tokens_and_accept_bfloat16(name):
    ffn = make_activations().ffn.to("cpu", torch.bfloat16)
    router_ED = route(name, LayerActivations(ffn, ffn.gate_FD.new_empty(0, D)), make_experts())
    assert router_ED.dtype == torch.float32
    assert router_ED.isfinite().all()


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_rejects_unknown_parameters_and_names_the_nearest(name):
    for field in ROUTERS[name].params.model_fields:
        with pytest.raises(UpcycleError, match=f"did you mean '{field}'"):
            route(name, make_activations(), make_experts(), **{f"{field}x": 1})


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("normal", {"std": 0}),
        ("ridge", {"strength": 0}),
        ("low_rank", {"rank": 0}),
        ("representative", {"tokens": 0}),
        ("static", {"strength": 0}),
    ],
)
def test_values_out_of_range_are_rejected(name, params):
    with pytest.raises(UpcycleError, match=next(iter(params))):
        route(name, make_activations(), make_experts(), **params)


def test_expert_energy_is_the_sum_over_its_neurons():
    activations, experts_EM = make_activations(20), make_experts()
    pairs = list(expert_energies(activations, experts_EM))
    energy_TE = torch.cat([energy_tE for _, energy_tE in pairs])
    expected_TE = torch.from_numpy(naive_energies(activations, experts_EM)).float()
    torch.testing.assert_close(energy_TE, expected_TE, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat([x_tD for x_tD, _ in pairs]), activations.x_TD)


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_ridge_solves_the_normal_equations_of_root_energies(strength):
    activations, experts_EM = make_activations(), make_experts()
    root_TE = naive_energies(activations, experts_EM) ** 0.25
    expected_ED = normal_equations(activations.x_TD, root_TE, strength)
    router_ED = route("ridge", activations, experts_EM, strength=strength)
    torch.testing.assert_close(router_ED, expected_ED, rtol=1e-4, atol=1e-5)


def naive_representative(profile_TF, members):
    """The neuron whose unit profile is nearest to the mean of its expert's."""
    units = {i: profile_TF[:, i] / np.sqrt(np.sum(profile_TF[:, i] ** 2)) for i in members}
    mean_T = sum(units.values()) / len(members)
    return min(members, key=lambda i: np.sum((units[i] - mean_T) ** 2))


def test_representatives_are_nearest_to_the_mean_profile():
    activations, experts_EM = make_activations(), make_experts()
    profile_TF = naive_hidden(activations.ffn, activations.x_TD).abs().numpy()
    expected = [naive_representative(profile_TF, members) for members in experts_EM.tolist()]
    assert representatives(activations, experts_EM).tolist() == expected


def test_representative_rows_are_the_regression_of_those_neurons():
    activations, experts_EM = make_activations(), make_experts()
    chosen = representatives(activations, experts_EM)
    score_TE = naive_hidden(activations.ffn.take(chosen), activations.x_TD).abs().numpy()
    expected_ED = normal_equations(activations.x_TD, score_TE, 0.5)
    router_ED = route("representative", activations, experts_EM, strength=0.5)
    torch.testing.assert_close(router_ED, expected_ED, rtol=1e-4, atol=1e-5)


def test_representatives_are_picked_on_a_sample_and_fitted_on_all_tokens():
    activations, experts_EM = make_activations(), make_experts()
    chosen = representatives(LayerActivations(activations.ffn, activations.x_TD[::13]), experts_EM)
    score_TE = naive_hidden(activations.ffn.take(chosen), activations.x_TD).abs().numpy()
    expected_ED = normal_equations(activations.x_TD, score_TE, 0.5)
    router_ED = route("representative", activations, experts_EM, strength=0.5, tokens=10)
    torch.testing.assert_close(router_ED, expected_ED, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_centroid_is_the_mean_of_the_gate_rows(normalize):
    activations, experts_EM = make_activations(), make_experts()
    gate_FD = activations.ffn.gate_FD.double().numpy()
    router_ED = route("centroid", activations, experts_EM, normalize=normalize)
    for row_D, members in zip(router_ED, experts_EM.tolist(), strict=True):
        rows = [
            gate_FD[i] / (np.sqrt(gate_FD[i] @ gate_FD[i]) if normalize else 1) for i in members
        ]
        torch.testing.assert_close(row_D, torch.from_numpy(sum(rows) / len(rows)).float())


@pytest.mark.parametrize("std", [0.02, 3.0])
def test_normal_rows_have_mean_zero_and_the_deviation_asked_for(std):
    ffn = DenseFFN(torch.zeros(1, 4096), torch.zeros(1, 4096), torch.zeros(4096, 1), silu)
    activations = LayerActivations(ffn, torch.empty(0, 4096))
    router_ED = route("normal", activations, torch.zeros(E, 1, dtype=torch.int64), std=std)
    assert float(router_ED.std()) == pytest.approx(std, rel=0.03)
    assert abs(float(router_ED.mean())) < 0.03 * std
    assert router_ED.corrcoef().fill_diagonal_(0).abs().max() < 0.06


def test_normal_rows_differ_between_generators():
    first, second = (route("normal", make_activations(), make_experts(), seed=s) for s in (1, 2))
    assert (first != second).all()


def make_topics(loudness, tokens_per_topic=25):
    """Tokens of E topics, and experts that each answer most to one of them, in another order.

    Returns the activations, the experts and the mean input of each topic.
    """
    topics_ED = 6 * torch.linalg.qr(normal(D, E, seed=0)).Q.T
    favourite_F = torch.tensor([2, 0, 3, 1]).repeat_interleave(F // E)
    gate_FD = topics_ED[favourite_F] / 6 + 0.1 * normal(F, D, seed=1)
    down_DF = normal(D, F, seed=2) * loudness.repeat_interleave(F // E)
    x_TD = topics_ED.repeat(tokens_per_topic, 1) + normal(E * tokens_per_topic, D, seed=3)
    means_ED = torch.stack([sum(x_TD[c::E]) / tokens_per_topic for c in range(E)])
    ffn = DenseFFN(gate_FD, gate_FD, down_DF, silu)
    return LayerActivations(ffn, x_TD), torch.arange(F).view(E, -1), means_ED


@pytest.mark.parametrize("loudness", [[1, 1, 1, 1], [100, 1, 10, 0.1]])
def test_kmeans_gives_each_expert_the_centre_of_the_topic_it_answers_to(loudness):
    activations, experts_EM, means_ED = make_topics(torch.tensor(loudness))
    router_ED = route("kmeans", activations, experts_EM)
    torch.testing.assert_close(router_ED, means_ED[[2, 0, 3, 1]])


def test_kmeans_matches_one_to_one_at_the_largest_total_share():
    """Against all ways to match, with experts that have no clear favourite. A share is of the
    expert's own energy, so a loud expert counts no more than the others."""
    activations, _, means_ED = make_topics(torch.ones(E))
    experts_EM = make_experts()
    activations.ffn.down_DF.mul_(torch.linspace(0.1, 10, F))
    activations.ffn.down_DF[:, experts_EM[0]] *= 100
    energy_TE = naive_energies(activations, experts_EM)
    energy_CE = np.stack([energy_TE[c::E].mean(axis=0) for c in range(E)])
    share_CE = energy_CE / energy_CE.mean(axis=0)
    best = max(
        permutations(range(E)), key=lambda topics: sum(share_CE[c, e] for e, c in enumerate(topics))
    )
    torch.testing.assert_close(route("kmeans", activations, experts_EM), means_ED[list(best)])


def test_kmeans_accepts_tokens_that_are_no_multiple_of_the_experts():
    activations = make_activations(tokens=E * 9 + 3)
    assert route("kmeans", activations, make_experts()).shape == (E, D)


def uneven_topics():
    """Tokens around the directions of four topics, of which one has most, and neurons that fire
    on one topic only. Returns activations, experts and the mean of each expert's topic."""
    topics_ED = 6 * torch.linalg.qr(normal(D, E, seed=0)).Q.T
    topic_T = torch.tensor([3, 1, 0, 2]).repeat_interleave(torch.tensor([8, 60, 12, 20]))
    topic_T = topic_T[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    x_TD = topics_ED[topic_T] + 0.1 * normal(100, D, seed=2)
    favourite_F = torch.tensor([2, 0, 3, 1]).repeat_interleave(F // E)
    gate_FD = topics_ED[favourite_F] / 6
    ffn = DenseFFN(gate_FD, gate_FD, normal(D, F, seed=3), torch.relu)
    means_ED = torch.stack([x_TD[topic_T == topic].mean(0) for topic in (2, 0, 3, 1)])
    return LayerActivations(ffn, x_TD), torch.arange(F).view(E, -1), means_ED


def test_kmeans_without_balance_finds_topics_of_any_size():
    activations, experts_EM, means_ED = uneven_topics()
    router_ED = route("kmeans", activations, experts_EM, balanced=False)
    torch.testing.assert_close(router_ED, means_ED)
    equal_ED = route("kmeans", activations, experts_EM)
    assert (equal_ED - means_ED).abs().max() > 1  # clusters of 25 mix topics


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_kmeans_without_balance_accepts_clusters_that_stay_empty():
    activations = LayerActivations(make_activations().ffn, torch.ones(40, D))
    router_ED = route("kmeans", activations, make_experts(), balanced=False)
    assert torch.equal(router_ED, torch.ones(E, D))


def test_membership_is_the_regression_of_whose_topic_a_token_is():
    activations, experts_EM, _ = make_topics(torch.ones(E))
    expert_of_topic = torch.tensor([2, 0, 3, 1]).argsort()
    topic_T = torch.arange(len(activations.x_TD)) % E
    member_TE = np.eye(E)[expert_of_topic[topic_T]]
    for strength in (0.1, 2.0):
        expected_ED = normal_equations(activations.x_TD, member_TE, strength)
        router_ED = route("membership", activations, experts_EM, strength=strength)
        torch.testing.assert_close(router_ED, expected_ED, rtol=1e-4, atol=1e-5)


def test_membership_shares_out_tokens_that_centroids_give_to_the_longest():
    """Topics in nearly one direction, some of them longer."""
    length_E1 = torch.tensor([[4.0], [5.0], [6.0], [9.0]])
    topics_ED = length_E1 * (torch.eye(E, D) + 3 * torch.eye(D)[-1])
    x_TD = topics_ED.repeat(T, 1) + 0.1 * normal(E * T, D, seed=6)
    activations = LayerActivations(make_activations().ffn, x_TD)
    load = {}
    for name in ("kmeans", "membership"):
        chosen_T = (x_TD @ route(name, activations, make_experts()).T).argmax(1)
        load[name] = chosen_T.bincount(minlength=E).tolist()
    assert max(load["kmeans"]) == E * T
    assert load["membership"] == [T] * E


def test_low_rank_is_the_best_of_its_rank_for_the_logits_of_the_tokens():
    """Eckart and Young: as near to ridge's logits as their truncated singular values leave."""
    activations, experts_EM = make_activations(), make_experts()
    x_TD = activations.x_TD.double()
    full_ED = route("ridge", activations, experts_EM).double()
    logits_TE = x_TD @ full_ED.T
    left, values, right = torch.linalg.svd(logits_TE, full_matrices=False)
    for rank in (1, 2):
        low_ED = route("low_rank", activations, experts_EM, rank=rank).double()
        expected_TE = left[:, :rank] * values[:rank] @ right[:rank]
        assert torch.linalg.matrix_rank(low_ED, atol=1e-5) == rank
        torch.testing.assert_close(x_TD @ low_ED.T, expected_TE, rtol=1e-3, atol=1e-4)
        plain = torch.linalg.svd(full_ED)  # cut down without the tokens, logits are further off
        cut_ED = plain.U[:, :rank] * plain.S[:rank] @ plain.Vh[:rank]
        assert (x_TD @ cut_ED.T - logits_TE).norm() > (expected_TE - logits_TE).norm()


def test_low_rank_of_full_rank_chooses_the_same_experts():
    activations, experts_EM = make_activations(), make_experts()
    for rank in (E, D, 500):
        low_ED = route("low_rank", activations, experts_EM, rank=rank)
        torch.testing.assert_close(low_ED, route("ridge", activations, experts_EM))


def test_low_rank_factors_are_as_small_as_the_rank():
    x_TD = make_activations().x_TD
    up_ER, down_RD = truncated(normal(E, D, seed=7), x_TD, 2)
    assert (up_ER.shape, down_RD.shape) == ((E, 2), (2, D))


def make_predictable():
    """Root energies that are linear in x: (3 + direction · x) * scale, with a scale that gate
    rows do not show, and x always 1 in its first place."""
    expert_F = torch.arange(F) % E
    directions_ED = torch.linalg.qr(normal(D - 1, E, seed=0)).Q.T
    bias_F1 = torch.full((F, 1), 3.0)
    gate_FD = torch.cat([bias_F1, directions_ED[expert_F] + 0.05 * normal(F, D - 1, seed=1)], dim=1)
    up_FD = torch.zeros(F, D)
    up_FD[:, 0] = torch.linspace(0.7, 1.4, E)[expert_F]
    x_TD = normal(T, D, seed=2)
    x_TD[:, 0] = 1
    ffn = DenseFFN(gate_FD, up_FD, normal(D, F, seed=3), torch.relu)
    return LayerActivations(ffn, x_TD), expert_F.argsort(stable=True).view(E, -1)


def hit_rate(router_ED, activations, experts_EM, top_k=2):
    """The share of each token's top_k experts by true energy that the router selects."""
    energy_TE = torch.cat([energy_tE for _, energy_tE in expert_energies(activations, experts_EM)])
    hits = 0
    for energy_E, x_D in zip(energy_TE, activations.x_TD, strict=True):
        wanted = set(energy_E.topk(top_k).indices.tolist())
        hits += len(wanted & set((router_ED @ x_D).topk(top_k).indices.tolist()))
    return hits / (top_k * len(energy_TE))


def test_ridge_selects_the_experts_of_most_energy_and_beats_centroid_and_chance():
    activations, experts_EM = make_predictable()
    rate = {
        name: hit_rate(route(name, activations, experts_EM), activations, experts_EM)
        for name in ("ridge", "centroid", "normal")
    }
    assert rate["ridge"] > 0.95
    assert rate["centroid"] < 0.85
    assert rate["normal"] < 0.65


def make_offset(seed=5, tokens=T):
    """Activations on tokens that have a direction in common, in which they hardly differ."""
    activations = make_activations(tokens)
    common_D = normal(D, seed=seed)
    x_TD = activations.x_TD - activations.x_TD @ common_D[:, None] * common_D / common_D.norm() ** 2
    wobble_T1 = 1 + 0.05 * normal(tokens, 1, seed=seed + 1)
    return LayerActivations(activations.ffn, x_TD + common_D * wobble_T1)


@pytest.mark.parametrize("seed", [5, 15, 25])
def test_static_ranks_the_experts_by_mean_energy_for_every_token(seed):
    activations, experts_EM = make_offset(seed), make_experts()
    mean_E = naive_energies(activations, experts_EM).mean(axis=0)
    ranking = sorted(range(E), key=lambda e: -mean_E[e])
    logits_TE = activations.x_TD @ route("static", activations, experts_EM).T
    order_TE = logits_TE.argsort(dim=1, descending=True)
    assert {tuple(row) for row in order_TE.tolist()} == {tuple(ranking)}


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_static_chooses_the_experts_of_most_energy_on_tokens_not_seen(top_k):
    seen, experts_EM = make_offset(), make_experts()
    other = make_offset(tokens=3 * T)
    mean_E = torch.from_numpy(naive_energies(seen, experts_EM).mean(axis=0))
    expected = set(mean_E.topk(top_k).indices.tolist())
    router_ED = route("static", seen, experts_EM)
    chosen_TK = (other.x_TD @ router_ED.T).topk(top_k, dim=1).indices
    assert {frozenset(row) for row in chosen_TK.tolist()} == {frozenset(expected)}


def test_static_logits_are_equally_spaced_and_nearly_constant():
    activations, experts_EM = make_offset(), make_experts()
    mean_E = naive_energies(activations, experts_EM).mean(axis=0)
    rank_E = torch.tensor([sum(mean_E < mean) / E for mean in mean_E], dtype=torch.float32)
    logits_TE = activations.x_TD @ route("static", activations, experts_EM).T
    torch.testing.assert_close(logits_TE, rank_E.expand(T, E), atol=0.2, rtol=0)


def test_static_is_all_of_rank_one():
    router_ED = route("static", make_offset(), make_experts())
    assert torch.linalg.matrix_rank(router_ED, rtol=1e-4) == 1
