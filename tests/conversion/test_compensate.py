"""Compensation: a refit down_proj is the least squares that its formula says, solved here naively
in float64, and never worse than the dense one; descent takes the steps that its text says, taken
here by hand, and none that do not help."""

import math

import pytest
import torch
from reference import naive_hidden
from tiny import normal
from torch.nn.functional import silu

from upcycle.conversion.compensate import COMPENSATIONS
from upcycle.conversion.design import bind
from upcycle.core.errors import UpcycleError
from upcycle.core.settings import Choice
from upcycle.core.types import DenseFFN, ExpertLayout, LayerActivations

D, F, T = 12, 40, 150
STRENGTHS = [0.01, 0.3, 10.0]
SEEDS = [0, 1, 2]
MATRICES = ("gate_FD", "up_FD", "down_DF")
BATCH = 32
JITTER = 1e-6
"""Of the mean second moment: all that holds the neurons that are never on."""


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr("upcycle.conversion.compensate.descent.BATCH", BATCH)


def make_activations(seed=0, tokens=T, act=silu):
    gate_FD, up_FD = normal(2, F, D, seed=seed) / D**0.5
    down_DF = normal(D, F, seed=seed + 10) * torch.linspace(0.3, 3, F)
    ffn = DenseFFN(gate_FD, up_FD, down_DF, act)
    return LayerActivations(ffn, normal(tokens, D, seed=seed + 20))


def make_weights(seed=0, tokens=T):
    return normal(tokens, seed=seed + 30).exp()


def some_on(seed=0):
    """Each neuron is on for half of all inputs, whatever the others are."""
    direction_FD = normal(F, D, seed=seed + 40)
    return lambda x_TD: (x_TD @ direction_FD.T > 0).float()


def weighted(seed=0):
    """Each neuron that is on counts another positive number for each input."""
    on, direction_FD = some_on(seed), normal(F, D, seed=seed + 50)
    return lambda x_TD: on(x_TD) * (0.2 * x_TD @ direction_FD.T).exp()


def all_weighted(seed=0):
    """The same, with all neurons on."""
    direction_FD = normal(F, D, seed=seed + 60)
    return lambda x_TD: (0.2 * x_TD @ direction_FD.T).exp()


def all_on(x_TD):
    return x_TD.new_ones(len(x_TD), F)


def compensate(name, activations, selection, weight_T, **params):
    checked = bind(COMPENSATIONS, Choice(name=name, **params)).params
    y_TD = activations.output()
    return COMPENSATIONS[name].run(activations, selection, y_TD, weight_T, checked)


def least_squares(activations, selection, weight_T, **params):
    return compensate("least_squares", activations, selection, weight_T, **params).down_DF


def refit(seed=0, selection=None, **params):
    selection = selection or some_on(seed)
    return least_squares(make_activations(seed), selection, make_weights(seed), **params)


def naive_refit(activations, mask_TF, weight_T, strength, factors=(1.0,) * F):
    """Ordinary least squares of one row per token, and one row per neuron that holds its column to
    the dense one times the neuron's factor."""
    h_TF = naive_hidden(activations.ffn, activations.x_TD)
    down_DF = activations.ffn.down_DF.double()
    on_TF = h_TF * mask_TF.double()
    moment_F = torch.stack([sum(weight_T.double() * on_T**2) for on_T in on_TF.T])
    rows, targets = [], []
    for h_F, on_F, weight in zip(h_TF, on_TF, weight_T.double(), strict=True):
        rows.append(weight.sqrt() * on_F)
        targets.append(weight.sqrt() * (down_DF @ h_F))
    for i in range(F):
        row_F = torch.zeros(F, dtype=torch.float64)
        row_F[i] = (strength * moment_F[i] + JITTER * moment_F.mean()).sqrt()
        rows.append(row_F)
        targets.append(row_F[i] * factors[i] * down_DF[:, i])
    solution_FD = torch.linalg.lstsq(torch.stack(rows), torch.stack(targets)).solution
    return solution_FD.T.float()


def naive_factors(activations, count_TF, weight_T):
    """By what a neuron's weighted activations must be multiplied to be most like those that are
    not, on the tokens that it is on for: a regression of one number."""
    factors = []
    h_TF, weight_T = naive_hidden(activations.ffn, activations.x_TD), weight_T.double()
    for h_T, count_T in zip(h_TF.T, count_TF.double().T, strict=True):
        on = count_T > 0
        root_T = weight_T[on].sqrt()
        rows_T1 = (root_T * count_T[on] * h_T[on])[:, None]
        solution = torch.linalg.lstsq(rows_T1, (root_T * h_T[on])[:, None]).solution
        factors.append(float(solution))
    return factors


def naive_error(activations, mask_TF, weight_T, down_DF):
    """Σ_t w_t |y_t - W h̃_t|², token by token in float64."""
    h_TF = naive_hidden(activations.ffn, activations.x_TD)
    dense_DF, down_DF = activations.ffn.down_DF.double(), down_DF.double()
    error = 0.0
    for h_F, on_F, weight in zip(h_TF, mask_TF.double(), weight_T.double(), strict=True):
        error += weight * float((dense_DF @ h_F - down_DF @ (h_F * on_F)).square().sum())
    return float(error)


def weighted_error(seed, down_DF, selection=None):
    activations = make_activations(seed)
    mask_TF = (selection or some_on(seed))(activations.x_TD)
    return naive_error(activations, mask_TF, make_weights(seed), down_DF)


# --- any compensation ------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPENSATIONS)
def test_every_compensation_gives_finite_float32_weights_of_all_neurons(name):
    activations = make_activations()
    ffn = compensate(name, activations, some_on(), make_weights())
    for matrix in MATRICES:
        assert getattr(ffn, matrix).shape == getattr(activations.ffn, matrix).shape
        assert getattr(ffn, matrix).dtype == torch.float32
        assert getattr(ffn, matrix).isfinite().all()
        assert not getattr(ffn, matrix).requires_grad


@pytest.mark.parametrize("name", COMPENSATIONS)
def test_every_compensation_is_deterministic_and_leaves_the_random_state_alone(name):
    state = torch.get_rng_state()
    first, second = (compensate(name, make_activations(), some_on(), make_weights()) for _ in "ab")
    for matrix in MATRICES:
        assert torch.equal(getattr(first, matrix), getattr(second, matrix))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", COMPENSATIONS)
def test_no_compensation_touches_its_input(name):
    activations, weight_T = make_activations(), make_weights()
    compensate(name, activations, some_on(), weight_T)
    untouched = make_activations()
    assert torch.equal(weight_T, make_weights())
    assert torch.equal(activations.x_TD, untouched.x_TD)
    for matrix in MATRICES:
        assert torch.equal(getattr(activations.ffn, matrix), getattr(untouched.ffn, matrix))


@pytest.mark.parametrize("name", COMPENSATIONS)
@pytest.mark.parametrize("tokens_per_chunk", [1, 7, T - 1])
@pytest.mark.parametrize("held", [True, False])
def test_no_compensation_depends_on_chunking(name, monkeypatch, tokens_per_chunk, held):
    whole = compensate(name, make_activations(), some_on(), make_weights())
    monkeypatch.setattr("upcycle.core.types.CHUNK_ELEMENTS", tokens_per_chunk * F)
    monkeypatch.setattr("upcycle.core.types.HELD_ELEMENTS", T * F if held else 0)
    chunked = compensate(name, make_activations(), some_on(), make_weights())
    for matrix in MATRICES:
        torch.testing.assert_close(
            getattr(chunked, matrix), getattr(whole, matrix), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("name", COMPENSATIONS)
@pytest.mark.parametrize("seed", SEEDS)
def test_with_every_neuron_on_nothing_changes(name, seed):
    activations = make_activations(seed)
    ffn = compensate(name, activations, all_on, make_weights(seed))
    for matrix in MATRICES:
        assert torch.equal(getattr(ffn, matrix), getattr(activations.ffn, matrix))


def test_none_gives_the_very_weights():
    activations = make_activations()
    assert compensate("none", activations, some_on(), make_weights()) is activations.ffn


@pytest.mark.parametrize("strength", [0, 1e-9, -0.3, "much", math.nan, math.inf])
def test_strength_out_of_range_is_rejected(strength):
    with pytest.raises(UpcycleError, match="'least_squares': strength="):
        refit(strength=strength)


def test_unknown_parameters_are_rejected_and_the_nearest_is_named():
    with pytest.raises(UpcycleError, match="did you mean 'strength'"):
        refit(strengths=1)


# --- least squares ---------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [T, F // 2])
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_the_least_squares_of_tokens_and_of_columns_held_to_the_dense_ones(
    seed, strength, tokens
):
    activations, weight_T = make_activations(seed, tokens), make_weights(seed, tokens)
    mask_TF = some_on(seed)(activations.x_TD)
    expected_DF = naive_refit(activations, mask_TF, weight_T, strength)
    assert (expected_DF - activations.ffn.down_DF).abs().max() > 0.1
    found_DF = least_squares(activations, some_on(seed), weight_T, strength=strength)
    torch.testing.assert_close(found_DF, expected_DF, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [T, F // 2])
@pytest.mark.parametrize("selection", [weighted, all_weighted])
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("seed", SEEDS)
def test_where_neurons_count_unevenly_columns_are_held_to_scaled_ones(
    seed, strength, selection, tokens
):
    activations, weight_T = make_activations(seed, tokens), make_weights(seed, tokens)
    count_TF = selection(seed)(activations.x_TD)
    factors = naive_factors(activations, count_TF, weight_T)
    assert max(abs(factor - 1) for factor in factors) > 0.3
    expected_DF = naive_refit(activations, count_TF, weight_T, strength, factors)
    unscaled_DF = naive_refit(activations, count_TF, weight_T, strength)
    assert (expected_DF - activations.ffn.down_DF).abs().max() > 0.1
    assert (expected_DF - unscaled_DF).abs().max() > 0.01
    found_DF = least_squares(activations, selection(seed), weight_T, strength=strength)
    torch.testing.assert_close(found_DF, expected_DF, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selection", [weighted, all_weighted])
@pytest.mark.parametrize("strength", [1e-3, *STRENGTHS, 1e3])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_error_is_never_larger_than_with_the_scaled_columns(seed, strength, selection):
    activations, weight_T, selection = make_activations(seed), make_weights(seed), selection(seed)
    factors = naive_factors(activations, selection(activations.x_TD), weight_T)
    scaled_DF = activations.ffn.down_DF * torch.tensor(factors)
    before = weighted_error(seed, scaled_DF, selection)
    assert weighted_error(seed, refit(seed, selection, strength=strength), selection) < before


@pytest.mark.parametrize("count", [0.5, 2.0, 8.0])
def test_where_all_neurons_count_the_same_their_columns_make_up_for_it(count):
    changed_DF = refit(selection=lambda x_TD: count * all_on(x_TD))
    torch.testing.assert_close(changed_DF, make_activations().ffn.down_DF / count)


def test_strength_is_three_tenths_unless_given():
    assert torch.equal(refit(), refit(strength=0.3))


@pytest.mark.parametrize("strength", [1e-3, *STRENGTHS, 1e3])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_error_on_the_calibration_tokens_never_grows(seed, strength):
    before = weighted_error(seed, make_activations(seed).ffn.down_DF)
    assert weighted_error(seed, refit(seed, strength=strength)) < before


@pytest.mark.parametrize("tokens", [1, 2, F // 2])
def test_nor_does_it_on_fewer_tokens_than_neurons(tokens):
    activations, weight_T = make_activations(tokens=tokens), make_weights(tokens=tokens)
    mask_TF = some_on()(activations.x_TD)
    down_DF = least_squares(activations, some_on(), weight_T)
    before = naive_error(activations, mask_TF, weight_T, activations.ffn.down_DF)
    assert naive_error(activations, mask_TF, weight_T, down_DF) < before


@pytest.mark.parametrize("seed", SEEDS)
def test_the_weaker_the_penalty_the_smaller_the_error(seed):
    errors = [weighted_error(seed, refit(seed, strength=s)) for s in (1e-3, *STRENGTHS, 1e3)]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[-1]


def test_a_large_strength_gives_back_the_dense_weights():
    down_DF = make_activations().ffn.down_DF
    torch.testing.assert_close(refit(strength=1e9), down_DF, rtol=0, atol=1e-6)


@pytest.mark.parametrize("others_on", [some_on, weighted, all_weighted])
def test_neurons_that_are_never_on_keep_their_columns(others_on):
    never = torch.tensor([3, 17, F - 1])

    def selection(x_TD):
        return others_on()(x_TD).index_fill(1, never, 0)

    changed_DF, down_DF = refit(selection=selection), make_activations().ffn.down_DF
    assert changed_DF.isfinite().all()
    assert torch.equal(changed_DF[:, never], down_DF[:, never])
    others = torch.ones(F, dtype=torch.bool).index_fill(0, never, False)
    assert ((changed_DF - down_DF)[:, others].abs().amax(0) > 1e-3).all()


def test_a_layer_that_puts_out_nothing_keeps_its_weights():
    activations = make_activations(act=torch.zeros_like)
    down_DF = least_squares(activations, some_on(), make_weights())
    assert torch.equal(down_DF, activations.ffn.down_DF)


def test_tokens_of_weight_zero_do_not_count():
    activations, weight_T = make_activations(), make_weights()
    weight_T[::3] = 0
    counted = weight_T > 0
    some = LayerActivations(activations.ffn, activations.x_TD[counted])
    expected_DF = least_squares(some, some_on(), weight_T[counted])
    actual_DF = least_squares(activations, some_on(), weight_T)
    torch.testing.assert_close(actual_DF, expected_DF, rtol=1e-4, atol=1e-4)


def test_a_token_of_weight_two_counts_as_two():
    activations, weight_T = make_activations(), torch.ones(T)
    weight_T[:40] = 2
    doubled = torch.cat([torch.arange(40), torch.arange(T)])
    twice = LayerActivations(activations.ffn, activations.x_TD[doubled])
    expected_DF = least_squares(twice, some_on(), torch.ones(len(doubled)))
    actual_DF = least_squares(activations, some_on(), weight_T)
    torch.testing.assert_close(actual_DF, expected_DF, rtol=1e-4, atol=1e-4)


# --- descent ---------------------------------------------------------------------------------


MANY = 100 * BATCH
"""Tokens, enough for steps that help on others too."""


def even_weights(seed, tokens):
    """No token's error hides the others'."""
    return make_weights(seed, tokens) ** 0.2


def descend(seed=0, tokens=MANY, name="descent", selection=some_on, **params):
    activations, weight_T = make_activations(seed, tokens), even_weights(seed, tokens)
    return compensate(name, activations, selection(seed), weight_T, **params)


def naive_descent(seed, rate, selection):
    """Adam by hand in float64, from the least squares, on the error of the tokens that are on."""
    activations, weight_T = make_activations(seed, MANY), even_weights(seed, MANY).double()
    x_TD, mask_TF = activations.x_TD.double(), selection(seed)(activations.x_TD).double()
    y_TD = naive_hidden(activations.ffn, activations.x_TD) @ activations.ffn.down_DF.double().T
    batches = MANY // BATCH
    unit = sum(weight * y_D.square().sum() for weight, y_D in zip(weight_T, y_TD, strict=True))
    start = descend(seed, name="least_squares", selection=selection)
    matrices = [getattr(start, name).double() for name in MATRICES]
    steps = [rate * float(m.square().mean()) ** 0.5 / m.shape[1] ** 0.5 for m in matrices]
    means, squares = ([torch.zeros_like(m) for m in matrices] for _ in "ab")
    for step in range(batches - 1):
        gate_FD, up_FD, down_DF = leaves = [m.clone().requires_grad_() for m in matrices]
        error = 0.0
        for t in range(step, MANY, batches):
            h_F = silu(gate_FD @ x_TD[t]) * (up_FD @ x_TD[t]) * mask_TF[t]
            error = error + weight_T[t] * (down_DF @ h_F - y_TD[t]).square().sum()
        gradients = torch.autograd.grad(error * batches / unit, leaves)
        fade = min(1, (step + 1) / 10) * (1 - step / batches)
        for i, g in enumerate(gradients):
            means[i] = 0.9 * means[i] + 0.1 * g
            squares[i] = 0.95 * squares[i] + 0.05 * g**2
            mean = means[i] / (1 - 0.9 ** (step + 1))
            square = squares[i] / (1 - 0.95 ** (step + 1))
            matrices[i] = matrices[i] - fade * steps[i] * mean / (square.sqrt() + 1e-8)
    return [m.float() for m in matrices]


@pytest.mark.parametrize(("rate", "selection"), [(0.1, some_on), (0.3, some_on), (0.1, weighted)])
@pytest.mark.parametrize("seed", SEEDS)
def test_it_takes_the_steps_of_adam_on_the_layers_own_error(seed, rate, selection):
    ffn, start = descend(seed, rate=rate, selection=selection), make_activations(seed).ffn
    for name, expected in zip(MATRICES, naive_descent(seed, rate, selection), strict=True):
        assert (expected - getattr(start, name)).abs().max() > 0.03
        torch.testing.assert_close(getattr(ffn, name), expected, rtol=2e-3, atol=2e-3)


def held_out_error(seed, ffn):
    activations = make_activations(seed, MANY)
    dense, x_TD = activations.ffn, activations.x_TD
    y_TD = naive_hidden(dense, x_TD) @ dense.down_DF.double().T
    on_TF = naive_hidden(ffn, x_TD) * some_on(seed)(x_TD).double()
    error_T = (on_TF @ ffn.down_DF.double().T - y_TD).square().sum(1)
    return float((even_weights(seed, MANY) * error_T)[MANY // BATCH - 1 :: MANY // BATCH].sum())


@pytest.mark.parametrize("seed", SEEDS)
def test_it_gains_on_least_squares_on_tokens_that_it_does_not_fit(seed):
    start = descend(seed, name="least_squares")
    assert held_out_error(seed, descend(seed, rate=0.3)) < 0.95 * held_out_error(seed, start)


@pytest.mark.parametrize(("rate", "tokens"), [(100, MANY), (0.3, 2 * BATCH - 1)])
def test_steps_that_do_not_help_are_not_taken(rate, tokens):
    ffn = descend(tokens=tokens, rate=rate)
    expected = descend(tokens=tokens, name="least_squares")
    for name in MATRICES:
        assert torch.equal(getattr(ffn, name), getattr(expected, name))


def test_descent_starts_from_least_squares_of_the_same_strength():
    for strength in (0.01, 10):
        expected_DF = descend(name="least_squares", strength=strength).down_DF
        found_DF = descend(strength=strength, rate=1e-6).down_DF
        torch.testing.assert_close(found_DF, expected_DF, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [0, -1, 101, math.nan, math.inf])
def test_rate_out_of_range_is_rejected(rate):
    with pytest.raises(UpcycleError, match="'descent': rate="):
        descend(rate=rate)


# --- what neurons count ----------------------------------------------------------------------


def make_layout(shared_size, num_experts, seed=0):
    order_F = torch.randperm(F, generator=torch.Generator().manual_seed(seed))
    return ExpertLayout(order_F[shared_size:].view(num_experts, -1), order_F[:shared_size])


@pytest.mark.parametrize(("shared_size", "num_experts"), [(0, 5), (8, 4), (20, 1)])
def test_a_layout_is_made_again_from_its_permutation(shared_size, num_experts):
    layout = make_layout(shared_size, num_experts)
    again = ExpertLayout.of_permutation(layout.permutation, shared_size, num_experts)
    assert torch.equal(again.experts_EM, layout.experts_EM)
    assert torch.equal(again.shared_S, layout.shared_S)


@pytest.mark.parametrize("shared_size", [0, 8])
@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_shared_neurons_count_one_and_others_as_their_expert_if_its_logit_is_large(
    shared_size, top_k
):
    def weigh(logits_TE):
        top_TK = logits_TE.topk(top_k)
        return torch.zeros_like(logits_TE).scatter(1, top_TK.indices, top_TK.values.sigmoid())

    layout = make_layout(shared_size, 4)
    x_TD, router_ED = normal(T, D, seed=1), normal(4, D, seed=2)
    count_TF = layout.selection(router_ED, weigh)(x_TD)
    assert count_TF.shape == (T, F)
    for x_D, count_F in zip(x_TD, count_TF, strict=True):
        logits = [float(row_D.double() @ x_D.double()) for row_D in router_ED]
        counts = dict.fromkeys(layout.shared_S.tolist(), 1.0)
        for e in sorted(range(4), key=lambda e: -logits[e])[:top_k]:
            counts |= dict.fromkeys(layout.experts_EM[e].tolist(), 1 / (1 + math.exp(-logits[e])))
        expected = [counts.get(i, 0.0) for i in range(F)]
        assert count_F.tolist() == pytest.approx(expected, rel=1e-4)
