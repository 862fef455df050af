"""Each published recipe on a small layer, against its paper's rule written down again in loops.

Where a recipe departs on purpose, what is held is the departure: which part is the published
rule's, and which is not.
"""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from tiny import normal
from torch.nn.functional import cosine_similarity, normalize, silu

import upcycle
from upcycle.conversion.layer import convert_layer
from upcycle.core.clustering import balanced_kmeans
from upcycle.core.rng import generator
from upcycle.core.types import DenseFFN, LayerActivations, LossGradient

D, F, T = 48, 512, 400
WIDE = {"intermediate_size": F, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def activations():
    """Neurons around 40 directions, tokens around eight of them."""
    kinds = D**0.5 * normalize(normal(40, D, seed=0), dim=1)
    kind_F, kind_T = torch.arange(F) % 40, torch.arange(T) % 8
    gate_FD = (kinds[kind_F] + 0.7 * normal(F, D, seed=1)) / D**0.5
    gate_FD *= torch.linspace(0.5, 2, F)[:, None]
    down_DF = normal(D, F, seed=3) * torch.linspace(2, 0.5, F)
    ffn = DenseFFN(gate_FD, normal(F, D, seed=2) / D**0.5, down_DF, silu)
    loss = LossGradient(kinds[kind_T] @ normal(D, D, seed=5) + normal(T, D, seed=6), kind_T)
    return LayerActivations(ffn, kinds[kind_T] + 0.5 * normal(T, D, seed=4), loss=loss)


@pytest.fixture
def converted(dense, activations):
    """What a recipe makes of the layer."""

    def convert(recipe, **settings):
        model = str(dense(**WIDE))
        plan = upcycle.plan(model, recipe=recipe, target="qwen2_moe", **settings)
        return plan, convert_layer(plan, 0, activations.ffn, activations)

    return convert


def experts_of(layer):
    return layer.layout.experts_EM.tolist()


def neurons_of(experts):
    return sorted(np.concatenate(experts).tolist())


def hidden(activations):
    """h [T, F] in float64: silu(gate x) (up x)."""
    x, gate, up = (
        m.double().numpy()
        for m in (activations.x_TD, activations.ffn.gate_FD, activations.ffn.up_FD)
    )
    before = x @ gate.T
    return before / (1 + np.exp(-before)) * (x @ up.T)


def strength(activations):
    """|h| |down| [T, F]."""
    return np.abs(hidden(activations)) * activations.ffn.down_DF.double().norm(dim=0).numpy()


def assert_same_direction(router_ED, expected_ED):
    """Selection sees neither what rows have in common nor their scale."""
    expected_ED = expected_ED - expected_ED.mean(0)
    alike = cosine_similarity(router_ED.double().flatten(), expected_ED.double().flatten(), dim=0)
    assert alike > 1 - 1e-6


def scatter(rows, members):
    """Squared distances of rows to their cluster's mean."""
    return sum(((rows[m] - rows[m].mean(0)) ** 2).sum() for m in map(list, members))


def by_chance(rows, clusters):
    return scatter(rows, [range(len(rows))]) * (len(rows) - clusters) / (len(rows) - 1)


def exact_step(rows, centres, order=2):
    """Each row to a centre, equally many to each, at the least sum of |row - centre|^order."""
    size = len(rows) // len(centres)
    cost = (np.abs(rows[:, None] - centres[None]) ** order).sum(2).repeat(size, axis=1)
    owner = linear_sum_assignment(cost)[1] // size
    return [(owner == e).nonzero()[0].tolist() for e in range(len(centres))]


def exact_kmeans(rows, centres, steps):
    for _ in range(steps):
        members = exact_step(rows, centres)
        centres = np.stack([rows[m].mean(0) for m in members])
    return members


# --- MoEfication and EMoE ----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("moefication", 16), ("emoe", 64)])
def test_clusters_of_gate_rows_are_as_tight_as_size_constrained_k_means(
    converted, activations, name, count
):
    """From one start by plain k-means++ and exact assignments; equal partitions are not to be had,
    theirs differ from seed to seed."""
    _, layer = converted(name)
    rows = normalize(activations.ffn.gate_FD, dim=1).double().numpy()
    rng = np.random.default_rng(0)
    start = [int(rng.integers(F))]
    while len(start) < count:
        nearest = ((rows[:, None] - rows[start]) ** 2).sum(2).min(1)
        start.append(int(rng.choice(F, p=nearest / nearest.sum())))
    theirs = scatter(rows, exact_kmeans(rows, rows[start], steps=5))
    chance = by_chance(rows, count)
    assert neurons_of(experts_of(layer)) == list(range(F))
    assert chance - scatter(rows, experts_of(layer)) > 0.97 * (chance - theirs)


def test_emoe_selects_by_the_mean_response_of_an_experts_keys(converted, activations):
    plan, layer = converted("emoe")
    keys, x_TD = activations.ffn.gate_FD.double(), activations.x_TD[:50].double()
    for x_D in x_TD:
        scores = [sum(float(keys[i] @ x_D) for i in m) / len(m) for m in experts_of(layer)]
        best = sorted(range(len(scores)), key=lambda e: -scores[e])[: plan.design.geometry.top_k]
        ours = (layer.router_ED.double() @ x_D).topk(plan.design.geometry.top_k).indices.tolist()
        assert sorted(best) == sorted(ours)


def test_moefication_ranks_as_its_centre_router_but_for_the_centres_lengths(converted, activations):
    _, layer = converted("moefication")
    units = normalize(activations.ffn.gate_FD.double(), dim=1)
    centre_ED = torch.stack([sum(units[i] for i in m) / len(m) for m in experts_of(layer)])
    x_TD = normalize(activations.x_TD.double(), dim=1)
    theirs_TE = -torch.stack([(x_TD - centre_D).norm(dim=1) for centre_D in centre_ED], dim=1)
    ours_TE = x_TD @ layer.router_ED.double().T
    scale = float(layer.router_ED.std() / (centre_ED - centre_ED.mean(0)).std())
    with_bias_TE = ours_TE - scale * centre_ED.square().sum(1) / 2
    assert torch.equal(with_bias_TE.topk(8).indices, theirs_TE.topk(8).indices)
    same_T = [set(a) == set(b) for a, b in zip(*both_topk(ours_TE, theirs_TE, 8), strict=True)]
    assert 0 < sum(same_T) < T


def both_topk(a_TE, b_TE, top_k):
    return a_TE.topk(top_k).indices.tolist(), b_TE.topk(top_k).indices.tolist()


def test_coactivation_graph_adds_what_the_released_code_does(activations):
    """Where its f is 1 for a neuron that fires: min(1, the sum over a batch's tokens of f fᵀ)."""
    from upcycle.split.coactivation_graph import coactivation_counts

    first = LayerActivations(activations.ffn, activations.x_TD[:64])
    strength_TF = torch.from_numpy(strength(first))
    f_TF = torch.zeros(64, F).scatter_(1, strength_TF.topk(32).indices, 1)
    expected_FF = torch.zeros(F, F)
    for f_tF in f_TF.split(8):
        f_tF1 = f_tF[:, :, None]
        expected_FF += torch.bmm(f_tF1, f_tF1.mT).sum(0).clamp(max=1)
    assert coactivation_counts(first, 1 / 16, 8).tolist() == expected_FF.tolist()


# --- LLaMA-MoE ---------------------------------------------------------------------------------


def test_llama_moe_deals_neurons_out_at_random(converted):
    """Equally many to each, by nothing but the seed."""
    parts = [experts_of(converted("llama-moe", seed=seed)[1]) for seed in (0, 0, 1)]
    assert all(neurons_of(part) == list(range(F)) for part in parts)
    assert {len(members) for members in parts[0]} == {F // 16}
    assert parts[0] == parts[1] != parts[2]
    assert max(len(set(a) & set(b)) for a in parts[0] for b in parts[2]) < 12


def test_llama_moe_counts_selected_experts_as_the_released_scale_does_at_first(
    converted, activations
):
    """Softmax over four experts times four is 1 on average, and near it while the gate is small."""
    plan, layer = converted("llama-moe")
    ours_TK = plan.design.weigh(activations.x_TD @ layer.router_ED.T).topk(4).values
    theirs_TK = 4 * (0.02 * normal(T, 16, seed=8)).topk(4).values.softmax(1)
    assert float(theirs_TK.mean()) == pytest.approx(1)
    torch.testing.assert_close(ours_TK, theirs_TK, rtol=0, atol=0.08)


def taylor(activations):
    """|h ∂loss/∂h| [T, F]."""
    of_output = activations.loss.y_TD.double() @ activations.ffn.down_DF.double()
    return np.abs(hidden(activations) * of_output.numpy())


def naive_importance(activations, clusters):
    """Per cluster, the mean of |h ∂loss/∂h| over the tokens that its centroid has the largest dot
    product with; and the centroids."""
    whole = T // clusters * clusters
    rng = generator(0, "split", 0)
    _, centroids_CD = balanced_kmeans(activations.x_TD[:whole], clusters, rng)
    seen = [[] for _ in range(clusters)]
    for x_D, strength_F in zip(activations.x_TD, taylor(activations), strict=True):
        nearest = max(range(clusters), key=lambda c, x_D=x_D: float(centroids_CD[c] @ x_D))
        seen[nearest].append(strength_F)
    return [np.mean(rows, axis=0) for rows in seen], centroids_CD


def wishes(importance, size, taken=()):
    """What each expert would hold: its most important neurons of those not taken."""
    free = [i for i in range(F) if i not in set(taken)]
    return [sorted(free, key=lambda i, row=row: -row[i])[:size] for row in importance]


def naive_residual(importance, size):
    """Round by round, what most experts want is shared, until as much is as an expert holds."""
    taken = []
    while len(taken) < size:
        votes = np.bincount(neurons_of(wishes(importance, size, taken)), minlength=F)
        taken += (votes == votes.max()).nonzero()[0].tolist()[: size - len(taken)]
    return taken


def test_sharing_inner_is_each_experts_own_best(converted, activations):
    _, layer = converted("llama-moe-sharing-inner")
    importance, _ = naive_importance(activations, 8)
    assert experts_of(layer) == [sorted(wish) for wish in wishes(importance, F // 8)]


def test_sharing_inter_is_the_residual_of_what_most_want_and_each_experts_best_of_the_rest(
    converted, activations
):
    _, layer = converted("llama-moe-sharing-inter")
    importance, _ = naive_importance(activations, 7)
    residual = naive_residual(importance, F // 8)
    assert layer.layout.shared_S.tolist() == sorted(residual)
    assert experts_of(layer) == [sorted(wish) for wish in wishes(importance, F // 8, residual)]


@pytest.mark.parametrize(
    "name", ["llama-moe", "llama-moe-sharing-inner", "llama-moe-sharing-inter"]
)
def test_llama_moes_router_is_random_whatever_the_experts(converted, name):
    """One linear layer, where the paper has two."""
    _, layer = converted(name)
    assert layer.router_ED.shape == (len(layer.layout.experts_EM), D)
    assert layer.router_ED.corrcoef().triu(1).abs().max() < 0.6


def test_llama_moe_v2_shares_what_most_clusters_want_and_routes_by_their_centroids(
    converted, activations
):
    _, layer = converted("llama-moe-v2")
    importance, centroids_CD = naive_importance(activations, 7)
    assert layer.layout.shared_S.tolist() == sorted(naive_residual(importance, F // 8))
    assert_same_direction(layer.router_ED, centroids_CD)


def greedy(importance, neurons, size):
    """The most important pair of cluster and neuron first."""
    experts = [[] for _ in importance]
    pairs = [(row[i], c, i) for c, row in enumerate(importance) for i in neurons]
    placed = set()
    for _, cluster, neuron in sorted(pairs, reverse=True):
        if neuron not in placed and len(experts[cluster]) < size:
            experts[cluster].append(neuron)
            placed.add(neuron)
    return experts


def test_llama_moe_v2_deals_the_others_out_greedily(converted, activations):
    _, layer = converted("llama-moe-v2")
    importance, _ = naive_importance(activations, 7)
    routed = sorted(set(range(F)) - set(layer.layout.shared_S.tolist()))
    expected = [sorted(members) for members in greedy(importance, routed, F // 8)]
    assert experts_of(layer) == expected


# --- MoEBERT -----------------------------------------------------------------------------------


def test_moebert_has_two_thirds_of_each_expert_in_all_and_deals_the_others_out(
    converted, activations
):
    """By |Σ h ∂loss/∂h| of a text, here the tokens of a kind."""
    _, layer = converted("moebert")
    of_output = activations.loss.y_TD.double() @ activations.ffn.down_DF.double()
    effect = hidden(activations) * of_output.numpy()
    text = activations.loss.text_T.numpy()
    importance = sum(np.abs(effect[text == kind].sum(0)) for kind in range(8))
    ranked = np.argsort(-importance).tolist()
    common, size = ranked[: round(512 / 768 * F / 4)], F // 4
    expected = [(common + ranked[len(common) :][e::4])[:size] for e in range(4)]
    assert experts_of(layer) == [sorted(members) for members in expected]


# --- CMoE --------------------------------------------------------------------------------------


def marks(h, neurons):
    """1 where a neuron is among a token's ten strongest of these, [neurons, T]."""
    strongest = np.argsort(-np.abs(h[:, neurons]), axis=1, kind="stable")[:, :10]
    marked = np.zeros((len(neurons), len(h)))
    for t, row in enumerate(strongest):
        marked[row, t] = 1
    return marked


@pytest.fixture
def cmoe(converted, activations):
    """The recipe's layer, h, the routed neurons and their markers among themselves."""
    _, layer = converted("cmoe")
    h = hidden(activations)
    routed = np.array(neurons_of(experts_of(layer)))
    return layer, h, routed, marks(h, routed)


def test_cmoe_shares_the_neurons_of_highest_rate(cmoe):
    layer, h, _, _ = cmoe
    rates = marks(h, np.arange(F)).sum(1)
    assert layer.layout.shared_S.tolist() == sorted(np.argsort(-rates, kind="stable")[: F // 8])


def test_cmoe_clusters_markers_as_tightly_as_the_released_code(cmoe):
    """Which takes one exact step by L1 distances from the neurons of highest rate."""
    layer, _, routed, marked = cmoe
    start = np.argsort(-marked.sum(1), kind="stable")[:14]
    theirs = exact_step(marked, marked[start], order=1)
    ours = [np.searchsorted(routed, members).tolist() for members in experts_of(layer)]
    chance = by_chance(marked, 14)
    assert chance - scatter(marked, ours) > 0.95 * (chance - scatter(marked, theirs))


def test_cmoe_routes_by_a_linear_fit_of_the_score_of_the_most_typical_neuron(cmoe, activations):
    """Typical by |h|, where the paper's is nearest to the centroid of the markers."""
    layer, h, routed, marked = cmoe
    scores, theirs, ours = [], [], []
    for members in experts_of(layer):
        profiles = np.abs(h[:, members]) / np.linalg.norm(h[:, members], axis=0)
        distance = ((profiles - profiles.mean(1, keepdims=True)) ** 2).sum(0)
        ours.append(members[int(distance.argmin())])
        own = marked[np.searchsorted(routed, members)]
        theirs.append(members[int(np.abs(own - own.mean(0)).sum(1).argmin())])
        scores.append(np.abs(h[:, ours[-1]]))
    assert ours != theirs
    x = activations.x_TD.double().numpy()
    y = np.stack(scores, axis=1)
    penalty = 0.1 * np.trace(x.T @ x) / D
    fit = np.linalg.solve(x.T @ x + penalty * np.eye(D), x.T @ (y - y.mean(1, keepdims=True)))
    assert_same_direction(layer.router_ED, torch.from_numpy(fit.T))


# --- copies ------------------------------------------------------------------------------------


def matrices(ffn):
    return ffn.gate_FD, ffn.up_FD, ffn.down_DF.T


def test_sparse_upcycling_copies_the_ffn_and_draws_the_router(converted, activations):
    plan, layer = converted("sparse-upcycling")
    moe = layer.experts(plan.design, 0)
    for expert in range(8):
        pairs = zip(matrices(moe.expert(expert)), matrices(activations.ffn), strict=True)
        assert all(torch.equal(copied, dense) for copied, dense in pairs)
    assert float(layer.router_ED.std()) == pytest.approx(0.02, rel=0.2)


def test_drop_upcycling_draws_one_set_of_neurons_for_all_three_matrices(converted, activations):
    """As in the paper; the released code draws three, so that an eighth of the neurons stays."""
    plan, layer = converted("drop-upcycling")
    moe, sets = layer.experts(plan.design, 0), []
    for expert in range(8):
        changed = []
        for new, old in zip(matrices(moe.expert(expert)), matrices(activations.ffn), strict=True):
            moved_F = (new != old).all(1)
            assert torch.equal(new[~moved_F], old[~moved_F])
            assert float(new[moved_F].std()) == pytest.approx(float(old[moved_F].std()), rel=0.05)
            assert abs(float(new[moved_F].mean() - old[moved_F].mean())) < 0.05 * float(old.std())
            changed.append(moved_F.nonzero()[:, 0].tolist())
        assert changed[0] == changed[1] == changed[2]
        assert len(changed[0]) == F // 2
        sets.append(tuple(changed[0]))
    assert len(set(sets)) == 8


def test_drop_upcyclings_router_is_normal(converted):
    """Of the released commands' deviation, 0.02; they draw it from ±0.035."""
    _, layer = converted("drop-upcycling")
    assert float(layer.router_ED.std()) == pytest.approx(0.02, rel=0.2)
    assert float(layer.router_ED.abs().max()) > 0.02 * 3**0.5


def test_granular_upcycling_makes_virtual_groups(converted):
    """Shards lie copy by copy, and the shards of a copy have one router row, as in Megatron."""
    _, layer = converted("granular-upcycling")
    shard = F // 8
    for expert, members in enumerate(experts_of(layer)):
        first = expert % 8 * shard
        assert members == list(range(first, first + shard))
        assert torch.equal(layer.router_ED[expert], layer.router_ED[expert // 8 * 8])
    assert len({tuple(row) for row in layer.router_ED.tolist()}) == 8
