"""Balanced clustering against scipy's exact assignment and planted blobs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from tiny import normal

from upcycle.core.clustering import (
    balanced_assignment,
    balanced_kmeans,
    greedy_assignment,
    importance_by_cluster,
    kmeans,
    spread_rows,
    squared_distance,
)
from upcycle.core.types import DenseFFN, LayerActivations

OPTIMALITY = 1e-3
"""Excess over the least cost, where costs are distances as in k-means."""

TIED_OPTIMALITY = 0.3
"""Excess over what the least cost saves against chance, where most costs are tied: there prices
can't tell items apart, and the heuristic is good, not optimal."""


def distances(num_items, num_bins, seed, width=6):
    items_FC, bins_EC = normal(num_items + num_bins, width, seed=seed).split([num_items, num_bins])
    return torch.cdist(items_FC, bins_EC).square()


def least_cost(cost_FE):
    """The Hungarian method with every bin repeated F / E times."""
    num_items, num_bins = cost_FE.shape
    repeated_FF = np.repeat(cost_FE.double().numpy(), num_items // num_bins, axis=1)
    return float(repeated_FF[linear_sum_assignment(repeated_FF)].sum())


def cost_of(cost_FE, owner_F):
    return sum(float(cost_FE[item, owner]) for item, owner in enumerate(owner_F.tolist()))


def assert_near_least_cost(cost_FE, owner_F):
    assert cost_of(cost_FE, owner_F) <= least_cost(cost_FE) * (1 + OPTIMALITY)


def assert_far_better_than_chance(cost_FE, owner_F):
    least, chance = least_cost(cost_FE), float(cost_FE.mean()) * len(cost_FE)
    assert cost_of(cost_FE, owner_F) - least <= TIED_OPTIMALITY * (chance - least)


def assert_balanced(owner_F, num_items, num_bins):
    assert owner_F.shape == (num_items,)
    assert owner_F.dtype == torch.int64
    sizes = {owner_F.tolist().count(e) for e in range(num_bins)}
    assert sizes == {num_items // num_bins}


@pytest.mark.parametrize(
    ("num_items", "num_bins"),
    [(64, 4), (60, 5), (96, 3), (200, 8), (256, 32), (24, 24), (16, 1)],
)
def test_assignment_costs_within_a_thousandth_of_the_least(num_items, num_bins):
    for seed in range(5):
        cost_FE = distances(num_items, num_bins, seed)
        owner_F = balanced_assignment(cost_FE)
        assert_balanced(owner_F, num_items, num_bins)
        assert_near_least_cost(cost_FE, owner_F)


def test_identical_items_are_spread_at_least_cost():
    cost_FE = distances(8, 4, seed=0).repeat_interleave(6, dim=0)
    owner_F = balanced_assignment(cost_FE)
    assert_balanced(owner_F, 48, 4)
    assert_near_least_cost(cost_FE, owner_F)


def test_identical_bins_share_their_items():
    cost_FE = distances(60, 2, seed=0).repeat(1, 3)
    owner_F = balanced_assignment(cost_FE)
    assert_balanced(owner_F, 60, 6)
    assert_far_better_than_chance(cost_FE, owner_F)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e6])
@pytest.mark.parametrize(("num_items", "num_bins"), [(12, 4), (9, 9), (5, 1)])
def test_equal_costs_give_equal_bins(num_items, num_bins, value):
    owner_F = balanced_assignment(torch.full((num_items, num_bins), value))
    assert_balanced(owner_F, num_items, num_bins)


@pytest.mark.parametrize(("num_items", "num_bins"), [(64, 4), (60, 12), (200, 8)])
def test_tied_costs_are_still_assigned_far_better_than_by_chance(num_items, num_bins):
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        cost_FE = torch.randint(0, 4, (num_items, num_bins), generator=rng).float()
        owner_F = balanced_assignment(cost_FE)
        assert_balanced(owner_F, num_items, num_bins)
        assert_far_better_than_chance(cost_FE, owner_F)


def test_as_many_bins_as_items_is_a_permutation():
    cost_FE = 1 - torch.eye(7)[torch.tensor([3, 0, 6, 1, 5, 2, 4])]
    assert balanced_assignment(cost_FE).tolist() == [3, 0, 6, 1, 5, 2, 4]


def test_assignment_leaves_its_input_alone():
    cost_FE = distances(24, 4, seed=0)
    before = cost_FE.clone()
    balanced_assignment(cost_FE)
    assert torch.equal(cost_FE, before)


@settings(max_examples=60, deadline=None)
@given(
    num_bins=st.integers(1, 9),
    capacity=st.integers(1, 9),
    levels=st.integers(1, 5),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 2**31),
)
def test_any_costs_give_bins_of_equal_size(num_bins, capacity, levels, exponent, seed):
    rng = torch.Generator().manual_seed(seed)
    shape = (num_bins * capacity, num_bins)
    cost_FE = torch.randint(-levels, levels + 1, shape, generator=rng) * 10.0**exponent
    assert_balanced(balanced_assignment(cost_FE), num_bins * capacity, num_bins)


def blobs(num_clusters, size, width=24, seed=0):
    """Rows in shuffled order around far-apart centres, and the blob of each."""
    rng = torch.Generator().manual_seed(seed)
    blob_F = torch.arange(num_clusters * size) % num_clusters
    blob_F = blob_F[torch.randperm(len(blob_F), generator=rng)]
    centres = 10 * torch.randn(num_clusters, width, generator=rng)
    return centres[blob_F] + torch.randn(len(blob_F), width, generator=rng), blob_F


def inertia(rows_FC, members):
    """Squared distances to the mean of one's cluster, summed in loops."""
    total = 0.0
    for rows in (rows_FC[member].double() for member in members):
        mean = sum(rows) / len(rows)
        total += sum(float(((row - mean) ** 2).sum()) for row in rows)
    return total


def cluster(rows_FC, num_clusters, seed=1):
    return balanced_kmeans(rows_FC, num_clusters, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_rows", "num_clusters"), [(64, 4), (60, 12), (18, 18), (7, 1)])
def test_clusters_partition_the_rows_and_centroids_are_their_means(num_rows, num_clusters):
    rows_FC = normal(num_rows, 24, seed=0)
    members_EM, centroids_EC = cluster(rows_FC, num_clusters)
    assert members_EM.shape == (num_clusters, num_rows // num_clusters)
    assert sorted(members_EM.flatten().tolist()) == list(range(num_rows))
    assert all(row == sorted(row) for row in members_EM.tolist())
    for member, centroid_C in zip(members_EM.tolist(), centroids_EC, strict=True):
        torch.testing.assert_close(centroid_C, sum(rows_FC[i] for i in member) / len(member))


def test_clustering_is_deterministic_and_leaves_its_rows_alone():
    rows_FC = normal(64, 24, seed=0)
    before = rows_FC.clone()
    first, second = cluster(rows_FC, 4), cluster(rows_FC, 4)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(rows_FC, before)


def test_clustering_leaves_global_randomness_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    cluster(normal(64, 24, seed=0), 4)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_clusters_are_tighter_than_any_of_many_random_partitions():
    rows_FC = normal(64, 5, seed=0)
    shuffles = [torch.randperm(64, generator=torch.Generator().manual_seed(s)) for s in range(20)]
    best_random = min(inertia(rows_FC, shuffle.view(4, 16)) for shuffle in shuffles)
    assert inertia(rows_FC, cluster(rows_FC, 4)[0]) < best_random


@pytest.mark.parametrize(("num_clusters", "size"), [(4, 16), (9, 5)])
def test_separated_blobs_are_found(num_clusters, size):
    rows_FC, blob_F = blobs(num_clusters, size)
    members_EM, _ = cluster(rows_FC, num_clusters)
    assert all(len(set(blob_F[member].tolist())) == 1 for member in members_EM)


@pytest.mark.parametrize("seed", range(5))
def test_one_row_of_every_blob_starts_it(seed):
    """Of rows drawn alike, some share a blob and some blobs have none."""
    rows_FC, blob_F = blobs(24, 5, seed=seed)
    start_E = spread_rows(rows_FC, 24, torch.Generator().manual_seed(seed))
    assert sorted(blob_F[start_E].tolist()) == list(range(24))


def loose(num_rows, seed):
    """Unit rows around many centres, which they hardly keep to, as rows of a weight matrix are."""
    centres = normal(num_rows // 4, 16, seed=seed)
    noisy = centres.repeat(4, 1) + 1.2 * normal(num_rows, 16, seed=seed + 1)
    return torch.nn.functional.normalize(noisy, dim=1)


def plain_start(rows, count, rng):
    """k-means++ with one candidate at a time."""
    chosen = [int(rng.integers(len(rows)))]
    while len(chosen) < count:
        nearest = ((rows[:, None] - rows[chosen]) ** 2).sum(2).min(1)
        chosen.append(int(rng.choice(len(rows), p=nearest / nearest.sum())))
    return rows[chosen]


def naive_kmeans(rows, centres):
    """Alternates the Hungarian method and means, as size-constrained k-means does."""
    size, members = len(rows) // len(centres), None
    for _ in range(30):
        cost = ((rows[:, None] - centres[None]) ** 2).sum(2).repeat(size, axis=1)
        before, members = members, (linear_sum_assignment(cost)[1] // size).argsort(kind="stable")
        members = members.reshape(len(centres), size)
        centres = rows[members].mean(1)
        if before is not None and (before == members).all():
            break
    return torch.from_numpy(members)


@pytest.mark.parametrize("seed", range(2))
def test_one_start_gains_nearly_as_much_as_the_best_of_ten(seed):
    """Which is what k-means-constrained does, by which MoEfication, EMoE and LLaMA-MoE cluster.
    From rows that are drawn alike one start gains about 0.89 of it."""
    rows_FC, rng = loose(96, seed), np.random.default_rng(seed)
    rows = rows_FC.double().numpy()
    chance = inertia(rows_FC, torch.arange(96)[None]) * (96 - 24) / (96 - 1)
    theirs = [naive_kmeans(rows, plain_start(rows, 24, rng)) for _ in range(10)]
    best = min(inertia(rows_FC, members) for members in theirs)
    ours = [inertia(rows_FC, cluster(rows_FC, 24, seed=s)[0]) for s in range(5)]
    assert chance - sum(ours) / 5 > 0.97 * (chance - best)


def test_rows_that_are_all_equal_still_give_equal_clusters():
    members_EM, centroids_EC = cluster(torch.ones(24, 3), 4)
    assert sorted(members_EM.flatten().tolist()) == list(range(24))
    assert torch.equal(centroids_EC, torch.ones(4, 3))


def test_rows_of_low_precision_are_clustered_in_float32():
    members_EM, centroids_EC = cluster(blobs(4, 16)[0].bfloat16(), 4)
    assert members_EM.shape == (4, 16)
    assert centroids_EC.dtype == torch.float32


# --- beside scikit-learn ----------------------------------------------------------------------


def least_inertia(rows_FC, num_clusters):
    """Of clusters of any size, the best of many starts."""
    return KMeans(num_clusters, n_init=30, random_state=0).fit(rows_FC.double().numpy()).inertia_


@pytest.mark.parametrize("seed", range(3))
def test_clusters_of_equal_size_are_no_tighter_than_those_of_any(seed):
    rows_FC = normal(48, 3, seed=seed)
    assert inertia(rows_FC, cluster(rows_FC, 4, seed)[0]) >= least_inertia(rows_FC, 4) * (1 - 1e-9)


@pytest.mark.parametrize(("num_clusters", "size"), [(4, 16), (9, 5)])
def test_blobs_of_equal_size_are_clustered_as_by_plain_kmeans(num_clusters, size):
    rows_FC, _ = blobs(num_clusters, size)
    found = inertia(rows_FC, cluster(rows_FC, num_clusters)[0])
    assert found == pytest.approx(least_inertia(rows_FC, num_clusters), rel=1e-9)


def uneven_blobs(sizes, seed=0):
    """Rows in shuffled order around far-apart centres, and the blob of each."""
    rng = torch.Generator().manual_seed(seed)
    blob_F = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    blob_F = blob_F[torch.randperm(len(blob_F), generator=rng)]
    centres = 10 * torch.randn(len(sizes), 24, generator=rng)
    return centres[blob_F] + torch.randn(len(blob_F), 24, generator=rng), blob_F


def plain(rows_FC, num_clusters, seed=0):
    return kmeans(rows_FC, num_clusters, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(3))
def test_plain_kmeans_finds_blobs_whatever_their_size(seed):
    sizes = [70, 11, 40, 5]
    rows_FC, blob_F = uneven_blobs(sizes, seed)
    members, centroids_EC = plain(rows_FC, 4, seed)
    assert sorted(map(len, members)) == sorted(sizes)
    assert all(row == sorted(row) for row in (member.tolist() for member in members))
    for member, centroid_C in zip(members, centroids_EC, strict=True):
        assert len(set(blob_F[member].tolist())) == 1
        torch.testing.assert_close(centroid_C, sum(rows_FC[i] for i in member) / len(member))


def test_plain_kmeans_depends_on_its_generator_alone():
    rows_FC = normal(300, 8, seed=0)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second, other = plain(rows_FC, 6), plain(rows_FC, 6), plain(rows_FC, 6, seed=1)
    assert torch.equal(first[1], second[1])
    assert all(map(torch.equal, first[0], second[0]))
    assert not torch.equal(first[1], other[1])
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_plain_kmeans_of_equal_rows_leaves_clusters_empty():
    members, centroids_EC = plain(torch.ones(24, 3).bfloat16(), 4)
    assert sorted(map(len, members)) == [0, 0, 0, 24]
    assert torch.equal(centroids_EC, torch.ones(4, 3))


def test_importance_is_of_the_clusters_that_are_asked_for():
    """Regions of 3 and 93 tokens; a neuron that fires in each. Clusters of equal size have the
    small region's tokens among others, and its neuron matters less to them."""
    x_TD = torch.eye(2).repeat_interleave(torch.tensor([3, 93]), dim=0)
    x_TD = x_TD + 0.01 * normal(96, 2, seed=0)
    ffn = DenseFFN(torch.eye(2), torch.eye(2), torch.eye(2), torch.relu)
    activations = LayerActivations(ffn, x_TD)
    rng = torch.Generator().manual_seed(0)
    found_CF = importance_by_cluster(activations, 2, rng, balanced=False)
    order = found_CF[:, 0].argsort(descending=True)
    torch.testing.assert_close(found_CF[order], torch.eye(2), rtol=0, atol=0.05)


def test_squared_distance_differs_from_the_true_one_by_a_constant_per_row():
    rows_FC, centroids_EC = normal(15, 6, seed=0), normal(4, 6, seed=1)
    difference_FE = squared_distance(rows_FC, centroids_EC).clone()
    for i, row_C in enumerate(rows_FC):
        for e, centroid_C in enumerate(centroids_EC):
            difference_FE[i, e] -= sum((a - b) ** 2 for a, b in zip(row_C, centroid_C, strict=True))
    torch.testing.assert_close(difference_FE, difference_FE[:, :1].expand(15, 4))


def test_items_that_do_not_fill_the_bins_are_refused():
    with pytest.raises(ValueError, match="10 items do not fill 3 bins equally"):
        balanced_assignment(torch.rand(10, 3))


@pytest.mark.parametrize(("bins", "items"), [(1, 5), (3, 12), (7, 56), (8, 8)])
def test_greedy_takes_the_pair_that_is_worth_most(bins, items):
    """Of those whose item is free and whose bin has room, again and again."""
    worth_EF = torch.rand(bins, items, generator=torch.Generator().manual_seed(items))
    owner, room = {}, [items // bins] * bins
    while len(owner) < items:
        free = [(b, i) for b in range(bins) for i in range(items) if room[b] and i not in owner]
        b, i = max(free, key=lambda pair: float(worth_EF[pair]))
        owner[i] = b
        room[b] -= 1
    assert greedy_assignment(worth_EF).tolist() == [owner[i] for i in range(items)]
