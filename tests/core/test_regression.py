"""Ridge regression against numpy's least squares on the augmented system."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from upcycle import UpcycleError
from upcycle.core.regression import predictable_profiles, ridge, sharpness

T, D, E = 57, 9, 4


def make_pair(tokens=T, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, D, generator=rng) * torch.linspace(0.2, 3, D)
    return x_TD, torch.randn(tokens, E, generator=rng) + x_TD[:, :E]


def test_nothing_is_fitted_on_zeros():
    x_TD, y_TE = make_pair()
    with pytest.raises(UpcycleError, match="there is nothing to fit on"):
        ridge([(0 * x_TD, y_TE)], 0.01)


def augmented_least_squares(x_TD, y_TE, strength):
    """min |x Wᵀ - y|² + λ|W|² is plain least squares with √λ I below x and zeros below y."""
    x, y = x_TD.double().numpy(), y_TE.double().numpy()
    penalty = strength * np.mean([float(column @ column) for column in x.T])
    tall_x = np.concatenate([x, np.sqrt(penalty) * np.eye(D)])
    tall_y = np.concatenate([y, np.zeros((D, E))])
    solution_DE, *_ = np.linalg.lstsq(tall_x, tall_y, rcond=None)
    return torch.from_numpy(solution_DE.T).float()


@pytest.mark.parametrize("strength", [1e-4, 0.01, 1.0, 30.0])
@pytest.mark.parametrize("tokens", [T, 5], ids=["many tokens", "fewer tokens than inputs"])
def test_ridge_is_least_squares_of_the_augmented_system(tokens, strength):
    x_TD, y_TE = (tensor.double() for tensor in make_pair(tokens))
    expected_ED = augmented_least_squares(x_TD, y_TE, strength)
    torch.testing.assert_close(ridge([(x_TD, y_TE)], strength), expected_ED)


@pytest.mark.parametrize("strength", [1e-4, 0.01, 1.0, 30.0])
@pytest.mark.parametrize("tokens", [T, 5], ids=["many tokens", "fewer tokens than inputs"])
def test_ridge_in_pieces_is_scikit_learns_of_the_whole(tokens, strength):
    """Whose penalty has a unit: `strength` of x's mean second moment, summed over tokens."""
    x_TD, y_TE = (tensor.double() for tensor in make_pair(tokens))
    alpha = strength * float(x_TD.square().sum(0).mean())
    theirs = Ridge(alpha=alpha, fit_intercept=False, solver="svd").fit(x_TD.numpy(), y_TE.numpy())
    ours_ED = ridge(zip(x_TD.split(7), y_TE.split(7), strict=True), strength)
    torch.testing.assert_close(ours_ED, torch.from_numpy(theirs.coef_).float())


def test_ridge_of_float32_inputs_is_off_by_their_rounding_only():
    x_TD, y_TE = make_pair()
    expected_ED = augmented_least_squares(x_TD, y_TE, 0.01)
    torch.testing.assert_close(ridge([(x_TD, y_TE)], 0.01), expected_ED)


def test_weights_are_float32_rows_per_output():
    weight_ED = ridge([make_pair()], 0.01)
    assert weight_ED.shape == (E, D)
    assert weight_ED.dtype == torch.float32


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_strength_has_no_unit(unit):
    x_TD, y_TE = make_pair()
    in_other_unit_ED = ridge([(x_TD * unit, y_TE)], 0.5) * unit
    torch.testing.assert_close(in_other_unit_ED, ridge([(x_TD, y_TE)], 0.5))


def test_strength_does_not_depend_on_the_number_of_tokens():
    x_TD, y_TE = make_pair()
    torch.testing.assert_close(ridge([(x_TD, y_TE)] * 3, 0.5), ridge([(x_TD, y_TE)], 0.5))


@pytest.mark.parametrize("piece", [1, 7, T])
def test_pieces_give_the_same_as_the_whole(piece):
    x_TD, y_TE = make_pair()
    pieces = zip(x_TD.split(piece), y_TE.split(piece), strict=True)
    torch.testing.assert_close(ridge(pieces, 0.01), ridge([(x_TD, y_TE)], 0.01))


def test_a_linear_target_is_found_exactly_without_penalty():
    x_TD = make_pair()[0].double()
    true_ED = torch.arange(E * D).view(E, D).double()
    torch.testing.assert_close(ridge([(x_TD, x_TD @ true_ED.T)], 1e-12), true_ED.float())


def test_more_strength_means_smaller_weights():
    norms = [float(ridge([make_pair()], strength).norm()) for strength in (0.01, 0.1, 1, 10)]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < norms[0] / 5


def test_many_pieces_are_added_up_in_float64():
    """In float32, a large first piece would swallow the small ones after it."""
    x_TD, y_TE = make_pair()
    large = (torch.full((1, D), 3e4), torch.full((1, E), 3e4))
    pieces = [large, *zip(x_TD.split(1), y_TE.split(1), strict=True)]
    whole = [torch.cat([piece[side] for piece in pieces]).double() for side in (0, 1)]
    torch.testing.assert_close(ridge(pieces, 1e-9), ridge([whole], 1e-9), rtol=1e-3, atol=1e-4)


def test_profiles_lie_as_far_apart_as_the_ridge_predictions():
    """With λ I in place of further tokens: |x w - x v|² + λ |w - v|² for every pair of targets."""
    x_TD, y_TE = (tensor.double() for tensor in make_pair())
    rows_ED = predictable_profiles([(x_TD, y_TE)], 0.5).double().numpy()
    weight_ED = augmented_least_squares(x_TD, y_TE, 0.5).double().numpy()
    x = x_TD.numpy()
    penalty = 0.5 * np.mean([float(column @ column) for column in x.T])
    for i in range(E):
        for j in range(E):
            gap_D = weight_ED[i] - weight_ED[j]
            expected = float(np.sum((x @ gap_D) ** 2) + penalty * gap_D @ gap_D)
            assert np.sum((rows_ED[i] - rows_ED[j]) ** 2) == pytest.approx(expected, rel=1e-4)


def cross_entropy(factor, logits_TE, target_TE):
    """Token by token."""
    return -sum(
        float(target_E @ (factor * logits_E).log_softmax(0))
        for logits_E, target_E in zip(logits_TE.double(), target_TE.double(), strict=True)
    )


def test_sharpness_is_the_factor_of_least_cross_entropy():
    logits_TE = make_pair()[1]
    drawn_T = torch.multinomial((7 * logits_TE).softmax(1), 1, generator=torch.Generator())[:, 0]
    target_TE = torch.eye(E)[drawn_T] * torch.linspace(0.5, 2, T)[:, None]
    factor = sharpness(logits_TE, target_TE, most=1000)
    assert 1.5 < factor < 900
    least = cross_entropy(factor, logits_TE, target_TE)
    assert all(cross_entropy(factor * f, logits_TE, target_TE) > least for f in (0.98, 1.02))


@pytest.mark.parametrize(("target", "expected"), [([0.0, 1.0], 1), ([1.0, 0.0], 50)])
def test_sharpness_stays_in_its_bounds(target, expected):
    logits_TE, target_TE = torch.tensor([[1.0, 0.0]]), torch.tensor([target])
    assert sharpness(logits_TE, target_TE, most=50) == pytest.approx(expected, rel=1e-3)
