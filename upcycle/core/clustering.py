"""Clustering into groups of exactly equal size or of any, and what matters in groups of tokens."""

import numpy as np
import torch
from torch import Tensor

from upcycle.core.importance import Importance, importances
from upcycle.core.types import LayerActivations


def balanced_assignment(cost_FE: Tensor) -> Tensor:
    """Put each of F items into one of E bins of F / E items at near-least total cost.

    Prices make the bins about equally attractive (dual ascent, as in an auction); items then
    propose to their cheapest bin, which takes those that would lose most elsewhere while it has
    room.
    Within 0.1 % of the optimum on distances with several items to a bin; less close when costs tie
    or bins hold one or two. Each step costs F x E, where the Hungarian method costs F³.

    Returns the bin of each item, [F] int64.

    Raises:
        ValueError: F is no multiple of E.
    """
    num_items, num_bins = cost_FE.shape
    if num_items % num_bins:
        raise ValueError(f"{num_items} items do not fill {num_bins} bins equally")
    capacity = num_items // num_bins
    return _fill(cost_FE + _prices(cost_FE, capacity), capacity)


def _prices(cost_FE: Tensor, capacity: int, rounds: int = 100) -> Tensor:
    # numpy, because torch's argmin over short rows is several times slower.
    cost, num_bins = cost_FE.numpy(), cost_FE.shape[1]
    price_E = np.zeros(num_bins, dtype=cost.dtype)
    step = (cost.max(1) - cost.min(1)).mean() / 4
    for _ in range(rounds):
        load_E = np.bincount((cost + price_E).argmin(1), minlength=num_bins)
        price_E += (step * (load_E / capacity - 1).clip(-1, 1)).astype(cost.dtype)
        step *= 0.93
    return torch.from_numpy(price_E)


def _fill(cost_FE: Tensor, capacity: int) -> Tensor:
    """Bins take the proposals with the most to lose, up to `capacity`; the rest propose again."""
    owner_F = torch.full((len(cost_FE),), -1)
    open_cost_FE = cost_FE.clone()
    while (owner_F < 0).any():
        free = (owner_F < 0).nonzero()[:, 0]
        two = open_cost_FE[free].topk(min(2, cost_FE.shape[1]), dim=1, largest=False)
        regret = (two.values[:, -1] - two.values[:, 0]).nan_to_num(posinf=torch.inf)
        wish = two.indices[:, 0]
        for e in wish.unique().tolist():
            room = capacity - int((owner_F == e).sum())
            proposals = (wish == e).nonzero()[:, 0]
            best = regret[proposals].argsort(descending=True, stable=True)[:room]
            owner_F[free[proposals[best]]] = e
            if len(proposals) >= room:
                open_cost_FE[:, e] = torch.inf
    return owner_F


def greedy_assignment(worth_EF: Tensor) -> Tensor:
    """Put each of F items into one of E bins of F / E items, the pair that is worth most first.

    Returns the bin of each item, [F] int64.
    """
    num_bins, num_items = worth_EF.shape
    owners, room = [-1] * num_items, [num_items // num_bins] * num_bins
    for pair in worth_EF.flatten().argsort(descending=True, stable=True).tolist():
        place, item = divmod(pair, num_items)
        if owners[item] < 0 and room[place]:
            owners[item] = place
            room[place] -= 1
    return torch.tensor(owners)


CANDIDATES = 16
"""Rows that are tried as each next start. On gate rows of SmolLM2-135M in 64 clusters of 24, one
start with sixteen is as good as the best of ten with scikit-learn's six. With a single one, which
is plain k-means++, an eighth of the gain over random clusters is lost, as with rows drawn alike."""


def balanced_kmeans(
    rows_FC: Tensor, num_clusters: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """k-means whose clusters all hold F / E rows (size-constrained k-means).

    Args:
        rows_FC: what is clustered, [F, C]; F must be a multiple of num_clusters.

    Returns:
        The members of each cluster [E, F / E], ascending, and the centroids [E, C].
    """
    rows_FC = rows_FC.float().cpu()
    return balanced_lloyd(rows_FC, rows_FC[spread_rows(rows_FC, num_clusters, rng)])


def balanced_lloyd(
    rows_FC: Tensor, centroids_EC: Tensor, *, iterations: int = 20
) -> tuple[Tensor, Tensor]:
    """The same from these centroids: balanced assignment and means until nothing moves."""
    owner_F = torch.zeros(len(rows_FC), dtype=torch.int64)
    for _ in range(iterations):
        previous, owner_F = owner_F, balanced_assignment(squared_distance(rows_FC, centroids_EC))
        members_EM = owner_F.argsort(stable=True).view(len(centroids_EC), -1)
        centroids_EC = rows_FC[members_EM].mean(1)
        if torch.equal(previous, owner_F):
            break
    return members_EM, centroids_EC


def spread_rows(rows_FC: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Rows to start k-means from, [E] (greedy k-means++, Arthur and Vassilvitskii 2007).

    The first is drawn at random. Of CANDIDATES rows, drawn in proportion to their squared distance
    from the nearest one chosen so far, the next is that which leaves the least sum of these
    distances. Choosing all costs about as much as CANDIDATES steps of k-means.
    """
    square_F = rows_FC.square().sum(1)
    chosen_E = torch.randint(len(rows_FC), (1,), generator=rng)
    nearest_F = _distances(rows_FC, square_F, chosen_E)[0]
    for _ in range(count - 1):
        # Rows that are all chosen or equal to one are drawn alike, but only where no others are.
        odds_F = nearest_F.clamp_min(torch.finfo(torch.float32).tiny)
        tried_R = odds_F.multinomial(CANDIDATES, replacement=True, generator=rng)
        nearer_RF = torch.minimum(_distances(rows_FC, square_F, tried_R), nearest_F)
        best = int(nearer_RF.sum(1).argmin())
        nearest_F, chosen_E = nearer_RF[best], torch.cat([chosen_E, tried_R[best, None]])
    return chosen_E


def _distances(rows_FC: Tensor, square_F: Tensor, some_R: Tensor) -> Tensor:
    """|row - row|² between some rows and all, [R, F]."""
    product_RF = rows_FC[some_R] @ rows_FC.T
    return (square_F[some_R, None] - 2 * product_RF + square_F).clamp_min(0)


def kmeans(rows_FC: Tensor, num_clusters: int, rng: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """k-means whose clusters hold the rows that lie nearest: any number, perhaps none.

    In float64, so that no row changes its cluster with the order in which threads add up.

    Returns:
        The members of each cluster, ascending, and the centroids [E, C].
    """
    from sklearn.cluster import KMeans

    rows_FC = rows_FC.float().cpu()
    start_EC = rows_FC[spread_rows(rows_FC, num_clusters, rng)]
    found = KMeans(num_clusters, init=start_EC.double().numpy(), n_init=1)
    owner_F = torch.from_numpy(found.fit_predict(rows_FC.double().numpy()))
    members = [(owner_F == e).nonzero()[:, 0] for e in range(num_clusters)]
    centroids = [
        rows_FC[member].mean(0) if len(member) else torch.from_numpy(centre).float()
        for member, centre in zip(members, found.cluster_centers_, strict=True)
    ]
    return members, torch.stack(centroids)


def importance_by_cluster(
    sample: LayerActivations,
    num_clusters: int,
    rng: torch.Generator,
    balanced: bool = True,
    by: Importance = "output",
) -> Tensor:
    """How much each neuron matters on average in each of C regions of hidden states [C, F].

    The regions are those of k-means; a token counts where the dot product with the centroid is
    largest.

    Args:
        balanced: whether clusters, from which the centroids are, hold equally many tokens.
    """
    x_TD = sample.x_TD[: len(sample.x_TD) // num_clusters * num_clusters]
    _, centroids_CD = (balanced_kmeans if balanced else kmeans)(x_TD, num_clusters, rng)
    num_neurons = sample.ffn.num_neurons
    importance_CF, tokens_C = torch.zeros(num_clusters, num_neurons), torch.zeros(num_clusters)
    for x_tD, importance_tF in importances(sample, by):
        cluster_t = (x_tD @ centroids_CD.to(x_tD).T).argmax(1)
        importance_CF.index_add_(0, cluster_t.cpu(), importance_tF.cpu().float())
        tokens_C += cluster_t.cpu().bincount(minlength=num_clusters)
    return importance_CF / tokens_C.clamp_min(1)[:, None]


def squared_distance(rows_FC: Tensor, centroids_EC: Tensor) -> Tensor:
    """|row - centroid|² up to each row's own constant, [F, E]: enough to compare centroids."""
    return centroids_EC.square().sum(1) - 2 * rows_FC @ centroids_EC.T
