"""What makes copies differ: drop-upcycling (arXiv:2502.19261) and noise."""

import pytest
import torch
from torch.nn.functional import silu

from upcycle.conversion.design import bind
from upcycle.core.errors import UpcycleError
from upcycle.core.settings import Choice
from upcycle.core.types import DenseFFN
from upcycle.split.copies import PERTURBS

D, F = 24, 64
OFFSET = {"gate_FD": 0.0, "up_FD": 0.3, "down_DF": -3.0}
SCALE = {"gate_FD": 1.0, "up_FD": 0.1, "down_DF": 4.0}


def make_ffn(*, shift=0.0, spread=1.0, dtype=torch.float32):
    """Every matrix has its own mean and scale; in the second half of the neurons, weights have
    their mean shifted by so many deviations, and their deviation multiplied."""
    rng = torch.Generator().manual_seed(0)
    second_F1 = torch.arange(F)[:, None] >= F // 2
    matrices = {}
    for name in OFFSET:
        rows_FD = torch.randn(F, D, generator=rng)
        rows_FD = torch.where(second_F1, shift + spread * rows_FD, rows_FD)
        matrices[name] = OFFSET[name] + SCALE[name] * rows_FD
    matrices["down_DF"] = matrices["down_DF"].T.contiguous()
    return DenseFFN(**{name: m.to(dtype) for name, m in matrices.items()}, act=silu)


def rows(ffn, name):
    """The matrix with one row per neuron."""
    return ffn.down_DF.T if name == "down_DF" else getattr(ffn, name)


def change(name, ffn, *, seed=1, **params):
    rng = torch.Generator().manual_seed(seed)
    return PERTURBS[name].run(ffn, bind(PERTURBS, Choice(name=name, **params)).params, rng)


def changed_neurons(old, new, name):
    return (rows(old, name) != rows(new, name)).any(1).nonzero()[:, 0].tolist()


def is_equal(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in OFFSET)


@pytest.mark.parametrize("name", PERTURBS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_perturbation_keeps_shapes_dtype_and_activation(name, dtype):
    old = make_ffn(dtype=dtype)
    new = change(name, old)
    assert new.act is old.act
    for matrix in OFFSET:
        assert getattr(new, matrix).shape == getattr(old, matrix).shape
        assert getattr(new, matrix).dtype == dtype
        assert getattr(new, matrix).isfinite().all()
        assert not torch.equal(getattr(new, matrix), getattr(old, matrix))


@pytest.mark.parametrize("name", PERTURBS)
def test_every_perturbation_depends_on_its_generator_alone(name):
    ffn, state = make_ffn(), torch.get_rng_state()
    assert is_equal(change(name, ffn, seed=1), change(name, ffn, seed=1))
    assert not is_equal(change(name, ffn, seed=1), change(name, ffn, seed=2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", PERTURBS)
def test_every_perturbation_leaves_its_input_alone(name):
    ffn = make_ffn()
    change(name, ffn)
    assert is_equal(ffn, make_ffn())


@pytest.mark.parametrize("name", PERTURBS)
def test_every_perturbation_rejects_unknown_parameters_and_names_the_nearest(name):
    field = next(iter(PERTURBS[name].params.model_fields))
    with pytest.raises(UpcycleError, match=f"did you mean '{field}'"):
        bind(PERTURBS, Choice(name=name, **{f"{field}s": 0.5}))


@pytest.mark.parametrize(
    ("name", "params"),
    [("drop", {"ratio": 1.01}), ("drop", {"ratio": -0.1}), ("noise", {"scale": -1})],
)
def test_values_out_of_range_are_rejected(name, params):
    with pytest.raises(UpcycleError, match=next(iter(params))):
        bind(PERTURBS, Choice(name=name, **params))


@pytest.mark.parametrize("ratio", [0.02, 1 / 3, 0.4, 0.5, 0.99])
def test_drop_changes_one_set_of_neurons_in_all_three_matrices(ratio):
    old = make_ffn()
    new = change("drop", old, ratio=ratio)
    changed = changed_neurons(old, new, "gate_FD")
    assert len(changed) == round(ratio * F)
    assert changed_neurons(old, new, "up_FD") == changed
    assert changed_neurons(old, new, "down_DF") == changed


def test_drop_draws_a_new_set_for_every_expert():
    old = make_ffn()
    sets = [changed_neurons(old, change("drop", old, seed=s), "gate_FD") for s in range(8)]
    assert len({tuple(s) for s in sets}) == 8
    assert set().union(*sets) == set(range(F))


def test_drop_replaces_every_entry_of_a_dropped_neuron():
    old = make_ffn()
    new = change("drop", old)
    dropped = changed_neurons(old, new, "gate_FD")
    for name in OFFSET:
        assert (rows(old, name)[dropped] != rows(new, name)[dropped]).all()


def test_drop_of_nothing_is_the_copy_bit_for_bit():
    assert is_equal(change("drop", make_ffn(), ratio=0), make_ffn())


def test_drop_of_everything_changes_every_neuron():
    old = make_ffn()
    new = change("drop", old, ratio=1)
    for name in OFFSET:
        assert changed_neurons(old, new, name) == list(range(F))


def test_drop_takes_mean_and_deviation_of_each_matrix():
    old = make_ffn()
    new = change("drop", old, ratio=1)
    for name in OFFSET:
        fresh = rows(new, name)
        assert float(fresh.mean()) == pytest.approx(OFFSET[name], abs=0.1 * SCALE[name])
        assert float(fresh.std()) == pytest.approx(SCALE[name], rel=0.1)


def single_drops(old):
    """Replaced and fresh weights of every matrix, one neuron at a time, of both halves."""
    halves = set()
    for seed in range(12):
        new = change("drop", old, ratio=1 / F, seed=seed)
        (neuron,) = changed_neurons(old, new, "gate_FD")
        halves.add(neuron // (F // 2))
        for name in OFFSET:
            yield name, rows(old, name)[neuron], rows(new, name)[neuron]
    assert halves == {0, 1}


def test_drop_takes_the_deviation_of_the_replaced_entries_not_of_the_whole():
    for _, replaced, fresh in single_drops(make_ffn(spread=100.0)):
        assert float(fresh.std()) == pytest.approx(float(replaced.std()), rel=0.6)


def test_drop_takes_the_mean_of_the_replaced_entries_not_of_the_whole():
    for name, replaced, fresh in single_drops(make_ffn(shift=100.0)):
        assert abs(float(fresh.mean() - replaced.mean())) < SCALE[name]


@pytest.mark.parametrize("scale", [0.01, 0.5])
def test_noise_is_a_share_of_each_matrix_own_deviation(scale):
    old = make_ffn()
    new = change("noise", old, scale=scale)
    for name in OFFSET:
        noise = rows(new, name) - rows(old, name)
        assert float(noise.std()) == pytest.approx(scale * SCALE[name], rel=0.1)
        assert abs(float(noise.mean())) < 0.1 * scale * SCALE[name]


def test_noise_of_different_matrices_is_unrelated():
    old = make_ffn()
    new = change("noise", old)
    noise = torch.stack([(rows(new, name) - rows(old, name)).flatten() for name in OFFSET])
    assert noise.corrcoef().fill_diagonal_(0).abs().max() < 0.1


def test_no_noise_is_the_copy():
    assert is_equal(change("noise", make_ffn(), scale=0), make_ffn())
