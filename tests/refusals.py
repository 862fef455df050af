"""What the plan refuses, in its own words."""

import pytest

import upcycle
from upcycle import UpcycleError


def refusal(dense, family="llama", out=None, *, fields=None, **settings) -> str:
    """The sentence with which the plan refuses the settings."""
    with pytest.raises(UpcycleError) as caught:
        upcycle.plan(str(dense(family, **(fields or {}))), out, **settings)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence
