"""Every split makes equal experts, nearly all of them a partition; each recovers the structure that
it looks for."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from reference import naive_hidden
from torch.nn.functional import silu

from upcycle.conversion.design import bind
from upcycle.core.clustering import greedy_assignment
from upcycle.core.errors import UpcycleError
from upcycle.core.rng import generator
from upcycle.core.settings import Choice
from upcycle.core.types import DenseFFN, LayerActivations, LossGradient
from upcycle.split import SPLITS
from upcycle.split.coactivation_graph import (
    coactivation_counts,
    cut,
    edges,
    rebalance,
)
from upcycle.split.spectral import embedding, strengthened

D, F, E, T = 24, 64, 4, 192
TEXT = 32  # tokens of a sequence
PURITY = 0.9
PLANTED = {
    "parameter_clustering": {},
    "coactivation": {},
    "coactivation_graph": {},
    "spectral": {},
    "predictability": {},
    "token_clusters": {},
    "sharing_inner": {},
}
"""The splits that look at the neurons, with parameters under which the planted groups show."""


def make_activations(seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    gate_FD, up_FD = torch.randn(2, F, D, generator=rng) / D**0.5
    ffn = DenseFFN(gate_FD, up_FD, torch.randn(D, F, generator=rng), silu)
    x_TD = torch.randn(T, D, generator=rng).to(dtype)
    loss = LossGradient(torch.randn(T, D, generator=rng).to(dtype), torch.arange(T) // TEXT)
    return LayerActivations(ffn.to("cpu", dtype), x_TD, loss=loss)


def make_planted(seed):
    """E groups of neurons that each answer to one direction, in shuffled order, and text whose
    topic is one of these directions for T / E tokens at a time. Returns each neuron's group."""
    rng = torch.Generator().manual_seed(seed)
    directions_ED = torch.linalg.qr(torch.randn(D, E, generator=rng)).Q.T
    group_F = torch.arange(F)[torch.randperm(F, generator=rng)] % E
    noise_2FD = 0.2 * torch.randn(2, F, D, generator=rng)
    gate_FD, up_FD = directions_ED[group_F] + noise_2FD
    ffn = DenseFFN(2 * gate_FD, up_FD, torch.randn(D, F, generator=rng), silu)
    topic_TD = 3 * directions_ED.repeat_interleave(T // E, dim=0)
    x_TD = topic_TD + 0.3 * torch.randn(T, D, generator=rng)
    loss = LossGradient(torch.randn(T, D, generator=rng), torch.arange(T) // TEXT)
    return LayerActivations(ffn, x_TD, loss=loss), group_F


def split(name, activations, *, num_experts=E, rng=None, **params):
    rng = rng or torch.Generator().manual_seed(1)
    choice = Choice(name=name, **params)
    return SPLITS[name].run(activations, num_experts, bind(SPLITS, choice).params, rng)


def purity(experts_EM, group_F):
    """The share of neurons that are in an expert mostly made of their own group."""
    groups = [group_F[members].tolist() for members in experts_EM]
    return sum(max(map(group.count, group)) for group in groups) / F


def assert_equal_experts(name, experts_EM, num_experts=E):
    assert experts_EM.shape == (num_experts, F // num_experts)
    assert experts_EM.dtype == torch.int64
    if SPLITS[name].partitions:
        assert sorted(experts_EM.flatten().tolist()) == list(range(F))
    for members in experts_EM.tolist():
        assert set(members) <= set(range(F))
        assert len(set(members)) == len(members)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("num_experts", [1, 2, E, 16])
def test_every_split_makes_equal_experts(name, num_experts):
    experts_EM = split(name, make_activations(), num_experts=num_experts)
    assert_equal_experts(name, experts_EM, num_experts)


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_lists_the_neurons_of_an_expert_in_order(name):
    rows = split(name, make_activations()).tolist()
    assert all(row == sorted(row) for row in rows)


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_accepts_bfloat16(name):
    assert_equal_experts(name, split(name, make_activations(dtype=torch.bfloat16)))


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_accepts_neurons_that_are_all_dead(name):
    activations = make_activations()
    activations.ffn.gate_FD.zero_()
    assert_equal_experts(name, split(name, activations))


@pytest.mark.parametrize("name", [n for n in SPLITS if not SPLITS[n].needs_activations])
def test_every_split_from_weights_accepts_an_empty_stream(name):
    ffn = make_activations(dtype=torch.bfloat16).ffn
    empty = LayerActivations(ffn, ffn.gate_FD.new_empty(0, D))
    assert_equal_experts(name, split(name, empty))


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_gives_the_same_answer_for_the_same_generator(name):
    first, second = (split(name, make_activations(), rng=generator(0, "split", 3)) for _ in "ab")
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_of_a_layer_is_independent_of_the_layers_before(name):
    activations = make_activations()
    alone = split(name, activations, rng=generator(0, "split", 1))
    split(name, make_activations(seed=5), rng=generator(0, "split", 0))
    assert torch.equal(split(name, activations, rng=generator(0, "split", 1)), alone)


@pytest.mark.parametrize("name", SPLITS)
def test_no_split_touches_its_input_or_global_randomness(name):
    activations, state = make_activations(), torch.get_rng_state()
    split(name, activations)
    untouched = make_activations()
    assert torch.equal(activations.x_TD, untouched.x_TD)
    for matrix in ("gate_FD", "up_FD", "down_DF"):
        assert torch.equal(getattr(activations.ffn, matrix), getattr(untouched.ffn, matrix))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", SPLITS)
def test_no_split_depends_on_chunking(name, monkeypatch):
    activations, _ = make_planted(0)
    whole = split(name, activations, **PLANTED.get(name, {}))
    monkeypatch.setattr("upcycle.core.types.CHUNK_ELEMENTS", 5 * F)
    assert torch.equal(split(name, activations, **PLANTED.get(name, {})), whole)


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_rejects_unknown_parameters(name):
    with pytest.raises(UpcycleError, match="has no parameter 'nonsense'"):
        split(name, make_activations(), nonsense=1)


@pytest.mark.parametrize("name", [n for n in SPLITS if SPLITS[n].params.model_fields])
def test_an_unknown_parameter_is_met_with_the_nearest_known(name):
    for field in SPLITS[name].params.model_fields:
        with pytest.raises(UpcycleError, match=f"did you mean '{field}'"):
            split(name, make_activations(), **{f"{field}x": 1})


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("coactivation", {"tokens": 0}),
        ("coactivation_graph", {"fire_fraction": 0}),
        ("coactivation_graph", {"fire_fraction": 1.1}),
        ("coactivation_graph", {"batch_tokens": 0}),
        ("coactivation_graph", {"batch_tokens": 9}),
        ("spectral", {"fire_fraction": 0}),
        ("parameter_clustering", {"rows": "down"}),
        ("token_clusters", {"tokens": 0}),
        ("token_clusters", {"importance": "energy"}),
        ("token_clusters", {"assignment": "best"}),
        ("common_neurons", {"common": 1}),
    ],
)
def test_values_out_of_range_are_rejected(name, params):
    with pytest.raises(UpcycleError, match=next(iter(params))):
        split(name, make_activations(), **params)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PLANTED)
def test_planted_groups_are_recovered(name, seed):
    activations, group_F = make_planted(seed)
    found = purity(split(name, activations, **PLANTED[name]), group_F)
    assert found >= PURITY
    assert found > purity(split("random", activations), group_F) + 0.3


def test_parameter_clustering_reads_the_matrix_that_rows_names():
    activations, group_F = make_planted(0)
    ffn = activations.ffn
    scrambled = torch.randn(F, D, generator=torch.Generator().manual_seed(0))
    only_up = LayerActivations(DenseFFN(scrambled, ffn.up_FD, ffn.down_DF, silu), activations.x_TD)
    assert purity(split("parameter_clustering", only_up, rows="up"), group_F) >= PURITY
    assert purity(split("parameter_clustering", only_up, rows="gate"), group_F) < 0.6


def uneven():
    """Factors [F, 1] over four orders of magnitude, in no order."""
    shuffled = torch.randperm(F, generator=torch.Generator().manual_seed(0))
    return 10 ** torch.linspace(-2, 2, F)[shuffled, None]


def test_parameter_clustering_ignores_the_length_of_rows():
    activations, group_F = make_planted(0)
    activations.ffn.gate_FD.mul_(uneven())
    assert purity(split("parameter_clustering", activations), group_F) >= PURITY


def test_coactivation_ignores_how_loud_a_neuron_is():
    activations, group_F = make_planted(0)
    activations.ffn.up_FD.mul_(uneven())
    assert purity(split("coactivation", activations), group_F) >= PURITY


def test_coactivation_ignores_the_sign_of_a_neuron():
    activations, group_F = make_planted(0)
    activations.ffn.up_FD[::2].neg_()
    assert purity(split("coactivation", activations), group_F) >= PURITY


def test_coactivation_profiles_are_as_long_as_asked():
    activations, group_F = make_planted(0)
    activations.x_TD[1::2] = torch.nan
    assert purity(split("coactivation", activations, tokens=T // 2), group_F) >= PURITY


def test_contiguous_slices_are_in_order():
    experts_EM = split("contiguous", make_activations())
    assert experts_EM.flatten().tolist() == list(range(F))


def test_random_depends_on_the_generator_and_not_on_the_order():
    splits = [split("random", make_activations(), rng=generator(0, "split", i)) for i in range(3)]
    assert all(not torch.equal(a, b) for a, b in pairwise(splits))
    assert not torch.equal(splits[0], split("contiguous", make_activations()))


def naive_counts(activations, firing, batch_tokens):
    """Loops over batches, their tokens and pairs of neurons."""
    norms = activations.ffn.down_DF.norm(dim=0).tolist()
    counts = [[0] * F for _ in range(F)]
    for x_bD in activations.x_TD.split(batch_tokens):
        pairs = set()
        for h_F in activations.ffn.hidden(x_bD).tolist():
            strength = [abs(h) * norm for h, norm in zip(h_F, norms, strict=True)]
            fired = sorted(range(F), key=lambda i: -strength[i])[:firing]
            pairs |= {(i, j) for i in fired for j in fired}
        for i, j in pairs:
            counts[i][j] += 1
    return counts


@pytest.mark.parametrize(
    ("fire_fraction", "firing", "batch_tokens"), [(0.1, 6, 8), (0.001, 1, 8), (0.25, 16, 5)]
)
def test_coactivation_counts_batches_with_a_token_on_which_both_fire(
    fire_fraction, firing, batch_tokens
):
    activations = make_activations()
    activations = LayerActivations(activations.ffn, activations.x_TD[:-3])  # no full last batch
    counts = coactivation_counts(activations, fire_fraction, batch_tokens)
    assert counts.tolist() == naive_counts(activations, firing, batch_tokens)


def test_neurons_that_fire_on_neighbouring_tokens_do_not_fire_together():
    """Token by token, another neuron fires: each batch sees them all, and no pair at once."""
    one_each = DenseFFN(torch.eye(D), torch.ones(D, D), torch.ones(D, D), silu)
    activations = LayerActivations(one_each, torch.eye(D).repeat(3, 1))
    counts = coactivation_counts(activations, 1 / D, 8)
    assert counts.tolist() == (3 * torch.eye(D)).tolist()


def test_coactivation_counts_do_not_depend_on_how_batches_are_grouped(monkeypatch):
    activations = make_activations()
    counts = coactivation_counts(activations, 0.1, 8)
    monkeypatch.setattr("upcycle.split.coactivation_graph.CHUNK_ELEMENTS", 20 * F)
    assert (coactivation_counts(activations, 0.1, 8) == counts).all()


def matrix(num_nodes, edges):
    """A symmetric one from {(i, j): weight}."""
    weight = np.zeros((num_nodes, num_nodes), dtype=np.int32)
    for (i, j), value in edges.items():
        weight[i, j] = weight[j, i] = value
    return weight


def complete(num_nodes, value):
    return {(i, j): value for i in range(num_nodes) for j in range(i)}


def weights(counts, most=None):
    """The edges' weights as a matrix again."""
    starts, neighbours, values = edges(counts, most)
    found = np.zeros(counts.shape, dtype=int)
    for i, (start, stop) in enumerate(pairwise(starts)):
        assert (values[start:stop] > 0).all()
        found[i, neighbours[start:stop]] = values[start:stop]
    return found.tolist()


def test_edges_count_in_units_of_the_first_non_zero_decile_and_what_is_less_is_dropped():
    """Of 49 entries the 7 on the diagonal are zero, so the first decile is 0; the two entries of
    the edge of weight 1 come next, and the second decile is 5."""
    counts = matrix(7, complete(7, 5) | {(1, 0): 1, (3, 2): 11})
    expected = matrix(7, complete(7, 1) | {(1, 0): 0, (3, 2): 2})
    assert weights(counts) == expected.tolist()


def test_no_neuron_has_an_edge_to_itself():
    counts = matrix(7, complete(7, 5) | {(i, i): 40 for i in range(7)})
    assert weights(counts) == matrix(7, complete(7, 1)).tolist()


def test_all_edges_are_kept_unless_asked():
    counts = matrix(600, complete(600, 3))
    assert weights(counts) == matrix(600, complete(600, 1)).tolist()


def test_strongest_edges_of_every_neuron_are_kept():
    path = matrix(4, {(0, 1): 20, (1, 2): 10, (2, 3): 40} | {(i, i): 90 for i in range(4)})
    assert weights(path, 1) == matrix(4, {(0, 1): 2, (2, 3): 4}).tolist()


def test_an_edge_is_kept_that_either_end_needs():
    star = matrix(4, {(0, 1): 10, (0, 2): 20, (0, 3): 40})
    assert weights(star, 1) == matrix(4, {(0, 1): 1, (0, 2): 2, (0, 3): 4}).tolist()


@pytest.mark.parametrize("most", [None, 2, 5, 9])
def test_counts_are_left_alone_and_no_edges_are_none(most):
    counts = matrix(5, {(0, 1): 20, (1, 2): 10, (2, 3): 40})
    before = counts.copy()
    edges(counts, most)
    assert (counts == before).all()
    assert not np.any(weights(0 * counts, most))


@pytest.mark.parametrize("seed", range(3))
def test_cut_parts_cliques_at_the_weakest_links(seed):
    """Three cliques of 4, interleaved, joined in a ring by light edges."""
    cliques = {(i, j): 9 for i, j in complete(12, 9) if i % 3 == j % 3}
    ring = {(0, 1): 1, (4, 5): 1, (2, 3): 1}
    parts = cut(edges(matrix(12, cliques | ring)), 3, seed).tolist()
    assert parts == parts[:3] * 4
    assert len(set(parts)) == 3


@pytest.mark.parametrize("light", range(4))
def test_cut_prefers_light_edges(light):
    """A ring of 12 whose every fourth edge is light."""
    ring = {(i, (i + 1) % 12): 1 if i % 4 == light else 50 for i in range(12)}
    parts = cut(edges(matrix(12, ring)), 3, 0).roll(-light - 1).view(3, 4)
    assert [len(set(part)) for part in parts.tolist()] == [1, 1, 1]


def test_cut_of_a_graph_without_edges_names_a_part_for_every_neuron():
    parts = cut(edges(matrix(12, {})), 3, 0)
    assert parts.shape == (12,)
    assert set(parts.tolist()) <= {0, 1, 2}


def rebalanced(parts, num_parts, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return rebalance(torch.tensor(parts), num_parts, rng).tolist()


def test_rebalance_leaves_equal_parts_as_they_are():
    assert rebalanced([2, 0, 1, 2, 1, 0], 3) == [[1, 5], [2, 4], [0, 3]]


def test_rebalance_moves_only_what_is_over():
    first, second = rebalanced([0, 0, 1, 0, 0, 1], 2)
    assert {2, 5} < set(second)
    assert sorted(first + second) == list(range(6))
    assert len(first) == len(second) == 3


def test_rebalance_moves_neurons_at_random():
    moved = {tuple(rebalanced([0, 0, 1, 0, 0, 1], 2, seed)[1]) for seed in range(40)}
    assert moved == {(0, 2, 5), (1, 2, 5), (2, 3, 5), (2, 4, 5)}


def test_rebalance_mixes_what_comes_from_different_parts():
    """Parts 0 and 1 have two neurons over each, parts 2 and 3 have room for two each."""
    filled = {frozenset(rebalanced([0] * 4 + [1] * 4, 4, seed)[2]) for seed in range(40)}
    from_both = [pair for pair in filled if min(pair) < 4 <= max(pair)]
    assert from_both
    assert len(from_both) < len(filled)


@pytest.mark.parametrize("parts", [[0] * 12, [1, 1, 1, 1, 1, 1, 1, 3, 3, 3, 3, 3]])
def test_rebalance_fills_empty_parts(parts):
    experts = rebalanced(parts, 4)
    assert [len(row) for row in experts] == [3, 3, 3, 3]
    assert sorted(neuron for row in experts for neuron in row) == list(range(12))


def test_markers_cluster_by_who_is_strongest_and_not_by_how_strong():
    """Neurons that are strongest on the same tokens go together, whatever they do elsewhere."""
    x_TD = torch.eye(D)[torch.arange(T) % E]
    group_F = torch.arange(F) % E
    gate_FD = torch.full((F, D), 1.0)
    gate_FD[torch.arange(F), group_F] = 5.0
    ffn = DenseFFN(gate_FD, torch.ones(F, D), torch.ones(D, F), silu)
    experts_EM = split("coactivation", LayerActivations(ffn, x_TD), markers=F // E)
    assert purity(experts_EM, group_F) == 1


def test_predictability_ignores_what_x_does_not_foretell():
    """Half of the neurons' groups show in x; the other half fire alike on tokens at random."""
    rng = torch.Generator().manual_seed(0)
    tokens = 4096
    kind_T = torch.randint(2, (tokens,), generator=rng)
    x_TD = torch.randn(tokens, D, generator=rng)
    x_TD[:, 0] = 6.0 * kind_T
    gate_FD = torch.randn(F, D, generator=rng) / D**0.5
    gate_FD[:, 0] = torch.where(torch.arange(F) % 2 == 0, 1.0, 0.0)
    ffn = DenseFFN(gate_FD, torch.ones(F, D) / D, torch.ones(D, F), silu)
    experts_EM = split("predictability", LayerActivations(ffn, x_TD), num_experts=2)
    assert purity(experts_EM, torch.arange(F) % 2) > PURITY


def naive_energies(activations):
    """Each neuron's, by loops in float64."""
    ffn, energies = activations.ffn, []
    h_TF = ffn.hidden(activations.x_TD).double()
    for i in range(F):
        length = sum(float(value) ** 2 for value in ffn.down_DF[:, i])
        energies.append(sum(float(h) ** 2 for h in h_TF[:, i]) * length)
    return energies


@pytest.mark.parametrize("num_experts", [1, E, F])
def test_ranked_experts_hold_the_strongest_neurons_first(num_experts):
    activations = make_activations()
    activations.ffn.down_DF.mul_(uneven()[:, 0])
    energies, size = naive_energies(activations), F // num_experts
    order = sorted(range(F), key=lambda i: -energies[i])
    expected = [set(order[start : start + size]) for start in range(0, F, size)]
    found = split("ranked", activations, num_experts=num_experts)
    assert [set(row) for row in found.tolist()] == expected


def test_ranked_is_not_by_activations_alone_nor_by_down_alone():
    """So that the test above can fail."""
    activations = make_activations()
    activations.ffn.down_DF.mul_(uneven()[:, 0])
    best = set(split("ranked", activations)[0].tolist())
    power_F = activations.ffn.hidden(activations.x_TD).square().sum(0)
    for score_F in (power_F, activations.ffn.down_DF.norm(dim=0)):
        assert best != set(score_F.topk(F // E).indices.tolist())


def make_clusters(seed, tokens=T, second=0.0):
    """Tokens around E orthogonal directions, and neurons that fire on one of them only; with
    `second` above 1 and below 2 on the next one too, less. Returns each neuron's direction, in
    shuffled order."""
    rng = torch.Generator().manual_seed(seed)
    directions_ED = torch.linalg.qr(torch.randn(D, E, generator=rng)).Q.T
    group_F = torch.randperm(F, generator=rng) % E
    gate_FD = 2 * directions_ED[group_F] - directions_ED.sum(0)
    gate_FD += second * directions_ED[(group_F + 1) % E]
    up_FD = directions_ED.sum(0).expand(F, D)
    x_TD = 5 * directions_ED[torch.randperm(tokens, generator=rng) % E]
    x_TD += 0.05 * torch.randn(tokens, D, generator=rng)
    ffn = DenseFFN(gate_FD, up_FD, torch.randn(D, F, generator=rng), torch.relu)
    return LayerActivations(ffn, x_TD), group_F


@pytest.mark.parametrize("seed", range(8))
def test_token_clusters_give_each_expert_the_neurons_of_one_cluster(seed):
    activations, group_F = make_clusters(seed)
    fires_TF = activations.ffn.hidden(activations.x_TD) != 0
    assert (fires_TF.sum(0) == T // E).all()
    experts_EM = split("token_clusters", activations)
    assert_equal_experts("token_clusters", experts_EM)
    assert purity(experts_EM, group_F) == 1


@pytest.mark.parametrize("seed", range(3))
def test_token_clusters_own_the_neurons_that_are_louder_there(seed):
    """All neurons fire on two clusters, equally often."""
    activations, group_F = make_clusters(seed, second=1.7)
    fires_TF = activations.ffn.hidden(activations.x_TD) != 0
    assert (fires_TF.sum(0) == 2 * T // E).all()
    assert purity(split("token_clusters", activations), group_F) == 1


def test_token_clusters_look_at_as_many_tokens_as_asked():
    activations, group_F = make_clusters(0)
    x_TD = activations.x_TD.repeat_interleave(2, dim=0)
    x_TD[1::2] = torch.nan
    more = LayerActivations(activations.ffn, x_TD)
    assert purity(split("token_clusters", more, tokens=T), group_F) == 1


@pytest.mark.parametrize("tokens", [E, T - 1, T - 3])
def test_token_clusters_need_no_multiple_of_the_experts(tokens):
    activations, _ = make_clusters(0)
    few = LayerActivations(activations.ffn, activations.x_TD[:tokens])
    assert_equal_experts("token_clusters", split("token_clusters", few))


@pytest.mark.parametrize("name", ["token_clusters", "sharing_inner"])
@pytest.mark.parametrize("seed", range(3))
def test_clusters_without_balance_may_hold_few_tokens(name, seed):
    """Of the E regions, one is half of the tokens, the last a sixteenth."""
    activations, group_F = make_clusters(seed)
    fires_TF = activations.ffn.hidden(activations.x_TD) != 0
    region_T = torch.stack([fires_TF[:, group_F == e].any(1) for e in range(E)]).int().argmax(0)
    kept = torch.cat([(region_T == e).nonzero()[: T // E // (1 + 3 * e), 0] for e in range(E)])
    few = LayerActivations(activations.ffn, activations.x_TD[kept])
    assert purity(split(name, few, balanced=False), group_F) == 1


@pytest.mark.parametrize("name", ["token_clusters", "sharing_inner"])
def test_clusters_without_balance_are_others(name):
    balanced, plain = (split(name, make_activations(), balanced=b) for b in (True, False))
    assert_equal_experts(name, plain)
    assert not torch.equal(balanced, plain)


# --- spectral --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_parts", [2, 5])
def test_spectral_embedding_has_the_angles_of_the_leading_eigenvectors(num_parts):
    """Of D^-1/2 A D^-1/2 without loops, by numpy's dense solver."""
    counts = np.random.default_rng(0).poisson(2, (20, 20))
    edges_FF = strengthened(counts + counts.T)
    plain_FF = edges_FF - np.diag(np.diag(edges_FF))
    degree_F = plain_FF.sum(1)
    vectors_FF = np.linalg.eigh(plain_FF / np.sqrt(np.outer(degree_F, degree_F)))[1]
    rows_FE = vectors_FF[:, -num_parts:]
    rows_FE /= np.linalg.norm(rows_FE, axis=1, keepdims=True)
    found_FE = embedding(edges_FF, num_parts, 0).numpy()
    np.testing.assert_allclose(found_FE @ found_FE.T, rows_FE @ rows_FE.T, atol=1e-6)


def test_every_edge_is_strengthened_by_the_mean_of_all_without_loops():
    counts = np.array([[9, 4, 0], [4, 9, 0], [0, 0, 9]], dtype=np.int32)
    off_diagonal = strengthened(counts)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(off_diagonal, np.array([4, 0, 0]) + 8 / 9)


@pytest.mark.filterwarnings("error")
def test_neurons_that_fire_with_no_others_leave_the_groups_whole():
    """Three of them and a pair, beside three groups of eight: without more edges they would be
    parts of their own."""
    group_F = torch.tensor([0, 1, 2] * 8 + [3, 4, 5, 6, 6])
    counts = 5 * (group_F[:, None] == group_F).int().numpy() + (group_F[:, None] < 3).numpy()
    counts = np.minimum(counts, counts.T)
    rows_FE = embedding(strengthened(counts), 3, 0)[:24]
    alike_FF = rows_FE @ rows_FE.T
    same_FF = group_F[:24, None] == group_F[:24]
    assert alike_FF[same_FF].min() > 0.95
    assert alike_FF[~same_FF].max() < 0.5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_experts", [F // 2, F])
def test_spectral_experts_may_be_as_small_as_a_neuron(num_experts):
    """Then each token fires one or two, and hardly any two fire together."""
    experts_EM = split("spectral", make_activations(), num_experts=num_experts)
    assert_equal_experts("spectral", experts_EM, num_experts)


# --- sharing inner ---------------------------------------------------------------------------


def test_sharing_inner_gives_each_expert_what_matters_most_to_it(monkeypatch):
    """Whatever the others take: neuron 0 to all of them, the last ones to none."""
    rng = torch.Generator().manual_seed(2)
    importance_EF = torch.rand(E, F, generator=rng)
    importance_EF[:, 0], importance_EF[:, -9:] = 2, -1
    monkeypatch.setattr(
        "upcycle.split.sharing_inner.importance_by_cluster", lambda *_: importance_EF
    )
    for found, row_F in zip(
        split("sharing_inner", make_activations()).tolist(), importance_EF.tolist(), strict=True
    ):
        best_first = sorted(range(F), key=lambda neuron: -row_F[neuron])
        assert found == sorted(best_first[: F // E])
        assert 0 in found
        assert max(found) < F - 9


def test_sharing_inner_does_not_hold_every_neuron_of_random_ones():
    held = split("sharing_inner", make_activations()).flatten().tolist()
    assert len(set(held)) < F


@pytest.mark.parametrize("tokens", [E, T - 1])
def test_sharing_inner_looks_at_as_many_tokens_as_asked(tokens):
    activations = make_activations()
    x_TD = activations.x_TD.repeat_interleave(2, dim=0)[: 2 * tokens]
    x_TD[1::2] = torch.nan
    more = split("sharing_inner", LayerActivations(activations.ffn, x_TD), tokens=tokens)
    few = split("sharing_inner", LayerActivations(activations.ffn, x_TD[::2]))
    assert torch.equal(more, few)


# --- Taylor importance -------------------------------------------------------------------------


def naive_effects(activations):
    """h ∂loss/∂h [T, F], token by token and neuron by neuron, in float64."""
    h_TF = naive_hidden(activations.ffn, activations.x_TD).tolist()
    gradient_TD = activations.loss.y_TD.double()
    columns = [column_D.double() for column_D in activations.ffn.down_DF.T]
    return [
        [h * float(gradient_D @ column_D) for h, column_D in zip(h_F, columns, strict=True)]
        for h_F, gradient_D in zip(h_TF, gradient_TD, strict=True)
    ]


def by_text(activations):
    """|Σ h ∂loss/∂h| over each text's tokens, added up, of each neuron."""
    effects = np.array(naive_effects(activations))
    return sum(np.abs(effects[start : start + TEXT].sum(0)) for start in range(0, T, TEXT))


@pytest.mark.parametrize(("common", "size"), [(0.5, 8), (0, 0), (0.667, 11), (0.97, 16)])
def test_common_neurons_are_moeberts_experts(common, size):
    """As its released code makes them of a list of neurons, the most important first."""
    activations = make_activations(2)
    importance = by_text(activations)
    ranked = sorted(range(F), key=lambda neuron: -importance[neuron])
    top, remain = ranked[:size], ranked[size:]
    expected = [(top + remain[expert::E])[: F // E] for expert in range(E)]
    found = split("common_neurons", activations, common=common)
    assert found.tolist() == [sorted(members) for members in expected]


def test_common_neurons_leave_out_the_least_important():
    activations = make_activations(2)
    activations.ffn.down_DF[:, 5] = 0
    held = split("common_neurons", activations).flatten().bincount(minlength=F)
    assert held[5] == 0
    assert (held == E).sum() == 11
    assert (held == 1).sum() == E * (F // E - 11)


def test_taylor_puts_neurons_where_the_loss_needs_them():
    """In one half of the text the loss looks at some neurons' outputs, in the other at others'."""
    ffn = make_activations().ffn
    ffn.down_DF.zero_()
    ffn.down_DF[0, ::2], ffn.down_DF[1, 1::2] = 1, 1
    rng = torch.Generator().manual_seed(3)
    topic_TD = torch.zeros(T, D)
    topic_TD[: T // 2, 2], topic_TD[T // 2 :, 3] = 9, 9
    gradient_TD = torch.zeros(T, D)
    gradient_TD[: T // 2, 0], gradient_TD[T // 2 :, 1] = 1, -1
    loss = LossGradient(gradient_TD, torch.arange(T) // TEXT)
    x_TD = topic_TD + torch.randn(T, D, generator=rng)
    activations = LayerActivations(ffn, x_TD, loss=loss)
    for name, params in {
        "sharing_inner": {},
        "token_clusters": {},
        "token_clusters ": {"assignment": "greedy"},
    }.items():
        taylor_EM = split(name.strip(), activations, num_experts=2, importance="taylor", **params)
        assert sorted(taylor_EM.tolist()) == [list(range(0, F, 2)), list(range(1, F, 2))]
        output_EM = split(name.strip(), activations, num_experts=2, **params)
        assert sorted(output_EM.tolist()) != sorted(taylor_EM.tolist())


def test_a_greedy_assignment_is_asked_for(monkeypatch):
    importance_EF = torch.rand(E, F, generator=torch.Generator().manual_seed(7))
    monkeypatch.setattr(
        "upcycle.split.token_clusters.importance_by_cluster", lambda *_: importance_EF
    )
    rows = split("token_clusters", make_activations(), assignment="greedy").tolist()
    owner_F = greedy_assignment(importance_EF).tolist()
    assert rows == [[i for i in range(F) if owner_F[i] == e] for e in range(E)]
    assert rows != split("token_clusters", make_activations()).tolist()


@pytest.mark.parametrize("name", SPLITS)
def test_only_gradients_that_are_asked_for_are_looked_at(name):
    """By its parameters a split says whether it needs a backward pass."""
    activations, checked = make_activations(), bind(SPLITS, Choice(name=name)).params
    without = LayerActivations(activations.ffn, activations.x_TD)
    if checked.needs_gradients:
        with pytest.raises(ValueError, match="needs_gradients"):
            split(name, without)
    else:
        assert torch.equal(split(name, without), split(name, activations))


@pytest.mark.parametrize("name", ["token_clusters", "sharing_inner"])
def test_taylor_importance_is_what_asks_for_gradients(name):
    assert bind(SPLITS, Choice(name=name, importance="taylor")).params.needs_gradients
