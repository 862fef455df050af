"""Condition numbers against numpy's, and rows that can't be told apart."""

import math

import numpy as np
import pytest
import torch

from upcycle.evaluation.gates import condition_number, inseparable


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 48), (8, 48), (48, 48)])
def test_condition_number_is_numpys(shape):
    rows_ED = rows(*shape)
    expected = np.linalg.cond(rows_ED.double().numpy())
    assert condition_number(rows_ED) == pytest.approx(expected)


def test_orthogonal_rows_have_1():
    assert condition_number(3 * torch.linalg.qr(rows(16, 4)).Q.T) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(9, 8), (3, 2)])
def test_more_rows_than_inputs_depend_on_each_other(shape):
    assert condition_number(rows(*shape)) == math.inf


def test_rows_that_are_alike_or_opposite():
    rows_ED = rows(4, 32)
    rows_ED[3] = 2 * rows_ED[1]
    assert condition_number(rows_ED) == math.inf
    assert inseparable(rows_ED) == [(1, 3)]
    rows_ED[3] = -rows_ED[1]
    assert condition_number(rows_ED) == math.inf
    assert inseparable(rows_ED) == []
    assert condition_number(torch.zeros(2, 8)) == math.inf
