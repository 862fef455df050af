"""Routing statistics: they are what counting in loops gives."""

import itertools

import pytest
import torch
from scipy.stats import entropy

from upcycle.evaluation.routing import (
    co_selection,
    count_pairs,
    layer_routing,
    relative_entropy,
    utilisation,
)

EXPERTS, TOKENS, TOP_K = 6, 200, 3


@pytest.fixture
def chosen():
    """Experts that tokens select [T, K]: uneven, and the last one never."""
    weights = torch.tensor([8.0, 4, 2, 1, 1, 0])
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(weights.expand(TOKENS, -1), TOP_K, generator=generator)


def naive_counts(chosen):
    """Tokens that select both e and f, by (e, f)."""
    counts = dict.fromkeys(itertools.product(range(EXPERTS), repeat=2), 0)
    for selected in chosen.tolist():
        for pair in itertools.product(selected, repeat=2):
            counts[pair] += 1
    return counts


def test_pairs_are_those_of_loops(chosen):
    pairs = count_pairs(chosen, EXPERTS)
    assert {(e, f): pairs[e, f] for e, f in naive_counts(chosen)} == naive_counts(chosen)


def test_pairs_of_batches_add_up(chosen):
    parts = [count_pairs(part, EXPERTS) for part in chosen.split(70)]
    assert torch.equal(sum(parts), count_pairs(chosen, EXPERTS))


def test_co_selection_is_that_of_loops(chosen):
    counts = naive_counts(chosen)
    ratios = co_selection(count_pairs(chosen, EXPERTS), TOKENS)
    for (e, f), both in counts.items():
        independent = counts[e, e] / TOKENS * counts[f, f] / TOKENS
        expected = float(counts[e, e] > 0) if e == f else both / TOKENS / (independent or 1)
        assert ratios[e, f] == pytest.approx(expected), (e, f)


def test_co_selection_of_random_experts():
    """K of E without replacement: E (K − 1) / ((E − 1) K), as the docstring says."""
    tokens = 100_000
    scores = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(0))
    ratios = co_selection(count_pairs(scores.topk(TOP_K).indices, EXPERTS), tokens)
    apart = ~torch.eye(EXPERTS, dtype=torch.bool)
    expected = EXPERTS * (TOP_K - 1) / ((EXPERTS - 1) * TOP_K)
    assert ratios[apart] == pytest.approx(expected, rel=0.02)


def test_entropy_is_scipys(chosen):
    counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
    expected = entropy(counts.numpy()) / entropy([1] * EXPERTS)
    assert relative_entropy(counts) == pytest.approx(expected)


@pytest.mark.parametrize(("counts", "expected"), [([5, 5, 5], 1), ([9, 0, 0], 0), ([4], 1)])
def test_entropy_at_its_ends(counts, expected):
    assert relative_entropy(torch.tensor(counts)) == pytest.approx(expected)


def test_utilisation_is_in_fair_shares():
    assert utilisation(torch.tensor([30, 10, 0, 0])) == [3, 1, 0, 0]


def test_layer_routing_holds_them_all(chosen):
    routing = layer_routing(7, count_pairs(chosen, EXPERTS), TOKENS)
    counts = naive_counts(chosen)
    fair = TOKENS * TOP_K / EXPERTS
    assert routing.layer == 7
    assert routing.dead == 1
    assert routing.load == pytest.approx([counts[e, e] / fair for e in range(EXPERTS)], abs=1e-4)
    assert 0 < routing.entropy < 1
    assert [row[e] for e, row in enumerate(routing.co_selection)] == [1, 1, 1, 1, 1, 0]
    assert routing.co_selection[5] == [0] * EXPERTS
