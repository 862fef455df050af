"""Every rule for the rest against loops over single entries, and vectors worked out by hand."""

import itertools
import weakref

import pytest
import torch

from upcycle.conversion.design import bind
from upcycle.conversion.rest import RESTS
from upcycle.core.errors import UpcycleError
from upcycle.core.settings import Choice

SHAPE = (7, 5)
DTYPES = [torch.float32, torch.bfloat16]


def normal(seed, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def merge(name, base, sources, *, seed=0, **params):
    rng = torch.Generator().manual_seed(seed)
    bound = bind(RESTS, Choice(name=name, **params))
    return bound.run(base, iter(sources), bound.params, rng)


def entrywise(base, sources, combine):
    """What `combine` makes of the base's entry and the sources' changes of it, in float64."""
    merged = torch.empty(base.shape, dtype=torch.float64)
    for place in itertools.product(*map(range, base.shape)):
        before = base[place].double().item()
        changes = [source[place].double().item() - before for source in sources]
        merged[place] = before + combine(changes)
    return merged.float()


def naively_trimmed(base, source, density):
    """The source with all but the largest of its changes undone."""
    change = (source.double() - base.double()).flatten()
    kept = sorted(range(len(change)), key=lambda i: -abs(change[i]))[: round(density * len(change))]
    stays = torch.zeros(len(change), dtype=torch.bool)
    stays[kept] = True
    return torch.where(stays.view(base.shape), source, base)


def agreeing(changes):
    """Those of the sign with the larger total."""
    return [c for c in changes if c * sum(changes) > 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_base_is_the_bases_tensor_and_reads_no_source(dtype):
    base, sources = normal(0, dtype), iter([normal(1, dtype)])
    assert torch.equal(RESTS["base"].run(base, sources, RESTS["base"].params(), None), base)
    assert torch.equal(next(sources), normal(1, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_mean_is_the_mean(dtype, number):
    base, sources = normal(0, dtype), [normal(1 + i, dtype) for i in range(number)]
    expected = entrywise(base, sources, lambda changes: sum(changes) / number)
    torch.testing.assert_close(merge("mean", base, sources), expected)


def test_linear_is_the_weighted_mean():
    base, sources = normal(0), [normal(1), normal(2), normal(3)]
    merged = merge("linear", base, sources, weights=[3, 0, 1.5])
    expected = entrywise(base, sources, lambda changes: (3 * changes[0] + 1.5 * changes[2]) / 4.5)
    torch.testing.assert_close(merged, expected)
    torch.testing.assert_close(merge("linear", base, sources), merge("mean", base, sources))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 1], "has 2 weights for 3 sources"),
        ([1, 1, 1, 1], "has 4 weights for 3 sources"),
        ([0, 0, 0], "only weights of 0"),
    ],
)
def test_linear_wants_a_weight_for_each_source(weights, message):
    with pytest.raises(UpcycleError, match=message):
        merge("linear", normal(0), [normal(1), normal(2), normal(3)], weights=weights)


@pytest.mark.parametrize(
    ("rule", "scale", "expected"),
    [
        ("sum", 1.0, [9.0, 4.0, 13.0]),
        ("mean", 1.0, [9.0, 7.0, 13.0]),
        ("sum", None, [9.5, 7.0, 11.5]),
        ("mean", None, [9.0, 7.0, 13.0]),
        ("sum", 2.0, [8.0, -2.0, 16.0]),
    ],
)
def test_ties_of_two_changes_by_hand(rule, scale, expected):
    """Changes [1, -2, 3] and [-1, -4, 0.5], of which two of three stay: [0, -2, 3] and
    [-1, -4, 0], so that the sums that agree are [-1, -6, 3] and their means [-1, -3, 3]."""
    base = torch.tensor([10.0, 10.0, 10.0])
    sources = [torch.tensor([11.0, 8.0, 13.0]), torch.tensor([9.0, 6.0, 10.5])]
    merged = merge("ties", base, sources, density=2 / 3, rule=rule, scale=scale)
    torch.testing.assert_close(merged, torch.tensor(expected))


@pytest.mark.parametrize("density", [0.05, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("rule", ["sum", "mean"])
def test_ties_is_the_formula_entry_by_entry(density, rule):
    base, sources = normal(0), [normal(1), normal(2), normal(3)]
    trimmed = [naively_trimmed(base, source, density) for source in sources]

    def combine(changes):
        same = agreeing(changes)
        return 0.7 * sum(same) / (max(1, len(same)) if rule == "mean" else 1)

    merged = merge("ties", base, sources, density=density, rule=rule, scale=0.7)
    torch.testing.assert_close(merged, entrywise(base, trimmed, combine), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["sum", "mean"])
def test_dare_keeps_each_change_or_drops_it_and_keeps_the_mean(rule):
    base, source = torch.full((200, 200), 5.0), torch.full((200, 200), 7.0)
    merged = merge("dare", base, [source], density=0.25, rule=rule)
    assert set(merged.flatten().tolist()) == {5.0, 13.0}
    assert (merged == 13).float().mean().item() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(("rule", "factor"), [("sum", 0.3), ("mean", 0.1)])
def test_dare_of_several_sources_is_what_is_drawn_of_each(rule, factor):
    """One entry's outcomes: every source's change over p, or nothing, each alone."""
    base, changes = torch.zeros(300, 100), (1.0, 10.0, 100.0)
    sources = [torch.full_like(base, change) for change in changes]
    merged = merge("dare", base, sources, density=0.5, rule=rule, scale=0.3)
    shares = {
        sum(drawn): sum(abs(merged - factor * sum(drawn) / 0.5).flatten() < 1e-4) / merged.numel()
        for drawn in itertools.product(*((0, change) for change in changes))
    }
    assert all(float(share) == pytest.approx(1 / 8, abs=0.01) for share in shares.values())


def test_dare_is_drawn_from_its_generator_alone():
    base, sources, state = normal(0), [normal(1), normal(2)], torch.get_rng_state()
    merged = merge("dare", base, sources, seed=1)
    assert torch.equal(merged, merge("dare", base, sources, seed=1))
    assert not torch.equal(merged, merge("dare", base, sources, seed=2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", RESTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [1, 3, 7])
def test_copies_of_the_base_stay_the_base_bit_for_bit(name, dtype, number):
    base = normal(0, dtype)
    assert torch.equal(merge(name, base, [base.clone()] * number).to(dtype), base)


@pytest.mark.parametrize("name", ["mean", "linear"])
@pytest.mark.parametrize("number", [1, 3, 7])
def test_equal_sources_are_themselves_bit_for_bit(name, number):
    base, source = normal(0), normal(1)
    assert torch.equal(merge(name, base, [source.clone() for _ in range(number)]), source)


def test_equal_sources_dont_overshoot():
    base, source = normal(0), normal(1)
    for number in (1, 2, 5):
        merged = merge("ties", base, [source] * number, density=1.0)
        torch.testing.assert_close(merged, source)


@pytest.mark.parametrize("name", RESTS)
def test_no_rule_changes_what_it_is_given(name):
    base, sources = normal(0), [normal(1), normal(2)]
    merge(name, base, sources)
    assert torch.equal(base, normal(0))
    assert torch.equal(sources[0], normal(1))
    assert torch.equal(sources[1], normal(2))


@pytest.mark.parametrize("name", RESTS)
def test_of_the_sources_one_tensor_at_a_time_is_alive(name):
    alive, most = [], []

    def read():
        for seed in range(1, 7):
            tensor = normal(seed)
            alive.append(weakref.ref(tensor))
            most.append(sum(reference() is not None for reference in alive))
            yield tensor
            del tensor

    merge(name, normal(0), read())
    # A loop lets go of a tensor when it has the next.
    assert max(most, default=0) <= 2
