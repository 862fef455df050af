"""What a check's ratios mean: the grade, the tokens that heal, the kind that was missing."""

import pytest

from upcycle.evaluation.verdict import AIM, Verdict, healed, healing, verdict


@pytest.mark.parametrize(
    ("ratio", "grade"),
    [
        (0.9, "fine"),
        (1.1, "fine"),
        (1.1001, "heal"),
        (4.999, "heal"),
        (5.0, "broken"),
        (1e9, "broken"),
        (float("inf"), "broken"),
    ],
)
def test_grade_is_that_of_the_worst_kind(ratio, grade):
    assert verdict({"a": 0.8, "b": ratio, "c": 0.85}).grade == grade


@pytest.mark.parametrize(
    ("ratio", "tokens"),
    [
        (1.1, None),  # nothing to heal
        (1.15, 20_000),
        (1.4, 20_000),
        (1.5, 100_000),
        (1.6, 800_000),
        (1.7, None),  # millions
        (5.1, None),
        (float("inf"), None),
        (float("nan"), None),
    ],
)
def test_tokens_that_heal(ratio, tokens):
    assert verdict({"a": ratio, "b": 1.0}).tokens == tokens


@pytest.mark.parametrize("ratio", [1.45, 1.5, 1.6])
def test_so_many_tokens_are_what_the_law_wants(ratio):
    """Of which one digit is kept."""
    tokens = healing(ratio)
    assert healed(ratio, tokens) == pytest.approx(AIM, rel=0.02)


@pytest.mark.parametrize(
    ("ratios", "add"),
    [
        ({"code": 1.6, "web": 1.0, "chat": 1.05}, "code"),  # 1.52 times the next
        ({"code": 1.6, "web": 1.0, "chat": 1.1}, None),  # 1.45 times
        ({"code": 1.5, "web": 1.0}, None),
        ({"code": 1.51, "web": 1.0}, "code"),
        ({"web": 1.3, "code": 9.0}, "code"),  # broken, and that is why
        ({"code": 1.05, "web": 0.5}, None),  # fine
        ({"code": 3.0}, None),  # of one kind there are no others
        ({"code": 3.0, "web": 3.0}, None),
    ],
)
def test_kind_that_stands_out_was_missing(ratios, add):
    assert verdict(ratios).add == add


def test_a_fine_model_needs_nothing():
    assert verdict({"a": 1.0, "b": 1.05}) == Verdict("fine", None, None)
