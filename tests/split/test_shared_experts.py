"""Scores of neurons for the shared expert, against loops over tokens and neurons."""

from collections import Counter

import numpy as np
import pytest
import torch
from reference import naive_hidden

from upcycle.conversion.design import bind
from upcycle.core.clustering import balanced_kmeans
from upcycle.core.errors import UpcycleError
from upcycle.core.settings import Choice
from upcycle.core.types import DenseFFN, Geometry, LayerActivations, LossGradient
from upcycle.split.shared import SHARED
from upcycle.split.shared.consensus import seniority

D, F, T = 24, 40, 19
GEOMETRY = Geometry(F, num_experts=3, top_k=1, expert_size=10, shared_size=10)
SEED = 5
TEXT = 4  # tokens of a sequence; the last is shorter


@pytest.fixture
def activations():
    rng = torch.Generator().manual_seed(0)
    gate_FD, up_FD = torch.randn(2, F, D, generator=rng) / D**0.5
    down_DF = torch.randn(D, F, generator=rng) * torch.linspace(0.3, 3, F)
    ffn = DenseFFN(gate_FD, up_FD, down_DF, torch.nn.functional.silu)
    x_TD = torch.randn(T, D, generator=rng)
    loss = LossGradient(torch.randn(T, D, generator=rng), torch.arange(T) // TEXT)
    return LayerActivations(ffn, x_TD, loss=loss)


def score(name, activations, **params):
    checked = bind(SHARED, Choice(name=name, **params)).params
    rng = torch.Generator().manual_seed(SEED)
    return SHARED[name].run(activations, GEOMETRY, checked, rng)


def ranking(score_F):
    return sorted(range(F), key=lambda neuron: -float(score_F[neuron]))


@pytest.mark.parametrize("name", SHARED)
def test_every_rule_scores_every_neuron(name, activations):
    score_F = score(name, activations)
    assert score_F.shape == (F,)
    assert score_F.isfinite().all()
    assert len(score_F.unique()) > 1


@pytest.mark.parametrize("name", SHARED)
def test_no_rule_depends_on_chunking(name, activations, monkeypatch):
    whole_F = score(name, activations)
    monkeypatch.setattr("upcycle.core.types.CHUNK_ELEMENTS", 3 * F)
    assert len(list(activations.chunks())) == 7
    torch.testing.assert_close(score(name, activations), whole_F)


@pytest.mark.parametrize("name", SHARED)
def test_no_rule_touches_its_input_or_global_randomness(name, activations):
    ffn, state = activations.ffn, torch.get_rng_state()
    before = [m.clone() for m in (ffn.gate_FD, ffn.up_FD, ffn.down_DF, activations.x_TD)]
    score(name, activations)
    after = [ffn.gate_FD, ffn.up_FD, ffn.down_DF, activations.x_TD]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", SHARED)
def test_every_rule_rejects_unknown_parameters(name):
    with pytest.raises(UpcycleError, match="has no parameter 'strngest'"):
        bind(SHARED, Choice(name=name, strngest=3))


@pytest.mark.parametrize("name", SHARED)
def test_every_rule_ranks_a_loud_neuron_first_and_a_dead_one_last(name, activations):
    gate_FD = activations.ffn.gate_FD.clone()
    up_FD = activations.ffn.up_FD.clone()
    gate_FD[17], up_FD[17] = 50 * gate_FD[17], 50 * up_FD[17]
    up_FD[0] = 0
    ffn = DenseFFN(gate_FD, up_FD, activations.ffn.down_DF, torch.nn.functional.silu)
    changed = LayerActivations(ffn, activations.x_TD, loss=activations.loss)
    score_F = score(name, changed, **shallow(name))
    assert score_F[17] == score_F.max()
    assert score_F[0] == score_F.min()


def shallow(name):
    """So few marks per token that the loudest neuron stands alone."""
    return {"strongest": 1} if name == "rate" else {}


def test_energy_is_the_sum_of_squared_contributions(activations):
    down_DF = activations.ffn.down_DF.double().tolist()
    energy_F = [0.0] * F
    for h_F in naive_hidden(activations.ffn, activations.x_TD).tolist():
        for neuron, h in enumerate(h_F):
            energy_F[neuron] += sum((h * row[neuron]) ** 2 for row in down_DF)
    score_F = score("energy", activations)
    torch.testing.assert_close(score_F, torch.tensor(energy_F))
    assert ranking(score_F) == ranking(energy_F)


@pytest.mark.parametrize("strongest", [1, 4, 10])
def test_rate_counts_the_tokens_on_which_a_neuron_is_among_the_strongest(activations, strongest):
    counts = [0] * F
    for h_F in naive_hidden(activations.ffn, activations.x_TD).tolist():
        for neuron in sorted(range(F), key=lambda i: -abs(h_F[i]))[:strongest]:
            counts[neuron] += 1
    assert score("rate", activations, strongest=strongest).tolist() == counts
    assert sum(counts) == strongest * T


def test_rate_marks_ten_neurons_as_in_the_paper(activations):
    assert score("rate", activations).sum() == 10 * T


def test_rate_marks_all_neurons_when_asked_for_more_than_there_are(activations):
    assert score("rate", activations, strongest=F + 1).tolist() == [T] * F


def test_energy_sees_down_proj_and_rate_does_not(activations):
    ffn = activations.ffn
    louder = ffn.down_DF.clone()
    louder[:, 3] *= 10
    changed = LayerActivations(DenseFFN(ffn.gate_FD, ffn.up_FD, louder, ffn.act), activations.x_TD)
    assert torch.equal(score("rate", changed), score("rate", activations))
    ratio = score("energy", changed)[3] / score("energy", activations)[3]
    assert float(ratio) == pytest.approx(100)


def naive_effects(activations):
    """h ∂loss/∂h, by token and neuron."""
    h_TF, gradient_TD = naive_hidden(activations.ffn, activations.x_TD), activations.loss.y_TD
    columns = activations.ffn.down_DF.double().T.tolist()
    return [
        [
            h * sum(g * w for g, w in zip(gradient_D, column_D, strict=True))
            for h, column_D in zip(h_F, columns, strict=True)
        ]
        for h_F, gradient_D in zip(h_TF.tolist(), gradient_TD.double().tolist(), strict=True)
    ]


def test_taylor_adds_up_absolute_values_token_by_token(activations):
    expected_F = [sum(map(abs, column)) for column in zip(*naive_effects(activations), strict=True)]
    score_F = score("taylor", activations)
    torch.testing.assert_close(score_F.float(), torch.tensor(expected_F))
    assert ranking(score_F) == ranking(expected_F)


def test_taylor_adds_up_absolute_values_text_by_text(activations):
    effects, expected_F = naive_effects(activations), [0.0] * F
    for start in range(0, T, TEXT):
        for neuron in range(F):
            expected_F[neuron] += abs(sum(row[neuron] for row in effects[start : start + TEXT]))
    score_F = score("taylor", activations, per="text")
    torch.testing.assert_close(score_F.float(), torch.tensor(expected_F), rtol=1e-4, atol=1e-4)
    assert ranking(score_F) != ranking(score("taylor", activations))


@pytest.mark.parametrize(
    ("name", "params"), [("taylor", {}), ("consensus", {"importance": "taylor"})]
)
def test_gradients_are_asked_for(activations, name, params):
    assert bind(SHARED, Choice(name=name, **params)).params.needs_gradients
    with pytest.raises(ValueError, match="needs_gradients"):
        score(name, LayerActivations(activations.ffn, activations.x_TD), **params)


@pytest.mark.parametrize("name", [name for name in SHARED if name != "taylor"])
def test_no_other_rule_looks_at_gradients(activations, name):
    assert not bind(SHARED, Choice(name=name)).params.needs_gradients
    without = LayerActivations(activations.ffn, activations.x_TD)
    assert torch.equal(score(name, without), score(name, activations))


def test_consensus_by_taylor_is_what_most_experts_want(activations):
    importance = naive_importance(activations, 8192, np.abs(naive_effects(activations)))
    expected = naive_residual(importance, size=10, room=10)
    assert ranking(score("consensus", activations, importance="taylor"))[:10] == expected
    assert ranking(score("consensus", activations))[:10] != expected


def output_strength(activations):
    """|h| |down|, by token and neuron."""
    norm_F = activations.ffn.down_DF.double().norm(dim=0)
    return (naive_hidden(activations.ffn, activations.x_TD).abs() * norm_F).numpy()


def naive_importance(activations, tokens, strength_TF):
    """Per cluster and neuron, the mean strength on the tokens that are nearest to the cluster by
    dot product."""
    every, clusters = max(1, -(-T // tokens)), GEOMETRY.num_experts
    x_TD, strength_TF = activations.x_TD[::every], strength_TF[::every]
    whole = len(x_TD) // clusters * clusters
    rng = torch.Generator().manual_seed(SEED)
    _, centroids_CD = balanced_kmeans(x_TD[:whole], clusters, rng)
    seen = [[] for _ in range(clusters)]
    for x_D, strength_F in zip(x_TD, strength_TF.tolist(), strict=True):
        nearest = max(range(clusters), key=lambda c, x_D=x_D: float(centroids_CD[c] @ x_D))
        seen[nearest].append(strength_F)
    return [[sum(column) / len(rows) for column in zip(*rows, strict=True)] for rows in seen]


def naive_residual(importance_EF, size, room):
    """The neurons that LLaMA-MoE's released code moves to the residual block, in its order."""
    wishes = [sorted(range(F), key=lambda i, row=row: -row[i]) for row in importance_EF]
    residual = []
    while len(residual) < room:
        counts = Counter(neuron for wish in wishes for neuron in wish[:size])
        most = max(counts.values())
        elected = sorted(neuron for neuron, count in counts.items() if count == most)
        residual += elected[: room - len(residual)]
        wishes = [[neuron for neuron in wish if neuron not in residual] for wish in wishes]
    return residual


@pytest.mark.parametrize("tokens", [8192, 10])
def test_consensus_is_what_most_experts_want_round_by_round(activations, tokens):
    importance = naive_importance(activations, tokens, output_strength(activations))
    expected = naive_residual(importance, size=10, room=10)
    assert len(set(expected)) == 10
    assert ranking(score("consensus", activations, tokens=tokens))[:10] == expected


@pytest.mark.parametrize("room", [1, 7, 20])
def test_consensus_takes_several_rounds_to_fill_a_larger_shared_expert(room):
    importance_EF = torch.rand(5, F, generator=torch.Generator().manual_seed(room))
    expected = naive_residual(importance_EF.tolist(), size=4, room=room)
    score_F = seniority(importance_EF, 4, room)
    assert ranking(score_F)[:room] == expected
    assert score_F.max() > 1 or room < 20


def test_consensus_prefers_what_all_want_to_what_one_wants_most():
    importance_EF = torch.zeros(3, F)
    importance_EF[:, 7] = 1
    importance_EF[0, 8] = 100
    importance_EF[1:, 9] = 2
    assert ranking(seniority(importance_EF, 2, 1))[0] == 7
