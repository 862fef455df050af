"""Innovations: what neurons add to others is what ordinary regression leaves of them."""

from dataclasses import replace

import pytest
import torch
from reference import naive_hidden
from tiny import normal
from torch.nn.functional import silu

from upcycle.core.innovation import STRENGTH, innovations
from upcycle.core.types import DenseFFN, LayerActivations, LossGradient

D, F, T = 10, 24, 200
NEURONS, OTHERS = torch.tensor([20, 3, 4, 5, 11, 17]), torch.tensor([0, 7, 8, 23, 12])


def make_activations(seed=0, tokens=T):
    gate_FD, up_FD = normal(2, F, D, seed=seed)
    ffn = DenseFFN(gate_FD, up_FD, normal(D, F, seed=seed + 10), silu)
    return LayerActivations(ffn, normal(tokens, D, seed=seed + 20))


def make_weights(seed=0):
    return normal(T, seed=seed + 30).exp()


def values(activations):
    return torch.cat([h_tF for _, h_tF in activations.chunks()])


def naive_innovations(activations, weight_T):
    """Ordinary least squares of one row per token, and one row per coefficient."""
    h_TF = naive_hidden(activations.ffn, activations.x_TD)
    h_TS, h_TR = h_TF[:, OTHERS], h_TF[:, NEURONS]
    root_T1 = weight_T.double().sqrt()[:, None]
    moment_S = torch.stack([sum(weight_T.double() * h_T**2) for h_T in h_TS.T])
    penalty = (STRENGTH * moment_S.mean()).sqrt() * torch.eye(len(OTHERS), dtype=torch.float64)
    rows = torch.cat([root_T1 * h_TS, penalty])
    targets = torch.cat([root_T1 * h_TR, torch.zeros(len(OTHERS), len(NEURONS))])
    return (h_TR - h_TS @ torch.linalg.lstsq(rows, targets).solution).float()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("tokens_per_chunk", [7, T])
def test_they_are_what_a_regression_on_the_others_leaves(monkeypatch, seed, tokens_per_chunk):
    monkeypatch.setattr("upcycle.core.types.CHUNK_ELEMENTS", tokens_per_chunk * F)
    activations, weight_T = make_activations(seed), make_weights(seed)
    found = innovations(activations, NEURONS, OTHERS, weight_T)
    expected_TR = naive_innovations(activations, weight_T)
    assert (expected_TR - values(activations)[:, NEURONS]).abs().max() > 0.1
    torch.testing.assert_close(values(found), expected_TR, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.x_TD, activations.x_TD)
    assert torch.equal(found.ffn.down_DF, activations.ffn.down_DF[:, NEURONS])


def test_a_neuron_that_the_others_make_up_has_none():
    activations = make_activations()
    for matrix in (activations.ffn.gate_FD, activations.ffn.up_FD):
        matrix[NEURONS[0]] = matrix[OTHERS[2]]
    found_TR = values(innovations(activations, NEURONS, OTHERS, make_weights()))
    energy_R = found_TR.square().sum(0) / values(activations)[:, NEURONS].square().sum(0)
    assert energy_R[0] < 0.01
    assert (energy_R[1:] > 0.1).all()


def test_some_of_them_on_some_tokens_are_the_same_numbers():
    found = innovations(make_activations(), NEURONS, OTHERS, make_weights())
    some = torch.tensor([4, 1])
    torch.testing.assert_close(values(found.take(some)), values(found)[:, some])
    torch.testing.assert_close(values(found.sample(T // 4)), values(found)[::4])
    power_R = values(found).square().sum(0) * found.ffn.down_DF.square().sum(0)
    torch.testing.assert_close(found.energy(), power_R)


def test_their_effects_are_what_the_rest_of_h_does_to_the_loss():
    activations, gradient_TD = make_activations(), normal(T, D, seed=40)
    loss = LossGradient(gradient_TD, torch.arange(T) // 10)
    differentiated = replace(activations, loss=loss)
    found = innovations(differentiated, NEURONS, OTHERS, make_weights())
    down_DR = activations.ffn.down_DF[:, NEURONS]
    expected_TR = values(found) * (gradient_TD @ down_DR)
    parts = [
        (found, expected_TR),
        (found.take(torch.tensor([4, 1])), expected_TR[:, [4, 1]]),
        (found.sample(T // 4), expected_TR[::4]),
    ]
    for part, expected in parts:
        effects = torch.cat([effect_tR for _, effect_tR in part.effects()])
        torch.testing.assert_close(effects, expected)


@pytest.mark.parametrize("silent", [True, False])
def test_with_nothing_to_foretell_from_they_are_the_activations(silent):
    activations, others = make_activations(), OTHERS
    if silent:
        activations.ffn.up_FD[OTHERS] = 0
    else:
        others = OTHERS[:0]
    found = innovations(activations, NEURONS, others, make_weights())
    torch.testing.assert_close(values(found), values(activations)[:, NEURONS])
