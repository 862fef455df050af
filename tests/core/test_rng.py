"""Randomness depends on (seed, stage, layer) and on nothing else."""

import pytest
import torch

from upcycle.core.rng import draw_seed, generator


def draws(rng):
    return torch.rand(16, generator=rng).tolist()


def test_same_seed_stage_and_layer_give_the_same_numbers():
    assert draws(generator(3, "split", 5)) == draws(generator(3, "split", 5))


@pytest.mark.parametrize("other", [(4, "split", 5), (3, "router", 5), (3, "split", 6)])
def test_each_of_seed_stage_and_layer_changes_the_numbers(other):
    assert draws(generator(3, "split", 5)) != draws(generator(*other))


def test_many_neighbours_are_all_different():
    stages = ["split", "router", *(f"perturb expert {e}" for e in range(8))]
    first = {
        draws(generator(seed, stage, layer))[0]
        for seed in range(3)
        for stage in stages
        for layer in range(12)
    }
    assert len(first) == 3 * len(stages) * 12


def test_an_earlier_layer_does_not_move_a_later_one():
    expected = draws(generator(0, "split", 1))
    draws(generator(0, "split", 0))
    assert draws(generator(0, "split", 1)) == expected


def test_global_seed_plays_no_part():
    torch.manual_seed(1)
    expected, state = draws(generator(0, "split", 0)), torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert draws(generator(0, "split", 0)) == expected


def test_drawn_seed_fits_numpy_and_moves_on():
    rng = generator(0, "split", 0)
    seeds = [draw_seed(rng) for _ in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**31 for seed in seeds)
