"""Nothing is lost, and nothing changes, when a command that writes is killed."""

import random

import pytest
from kills import commands, try_often


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return commands(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize("name", ["convert", "finetune", "eval"])
def test_killed_at_random_moments_ends_in_the_same_bytes(made, name):
    """Two tries, for which the command is run a handful of times; one over a former result."""
    try_often(*made[name], tries=2, rng=random.Random(0))
