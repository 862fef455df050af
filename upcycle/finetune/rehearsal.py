"""A look at a run that is not to be carried out: what it would cost here."""

import time

from upcycle.finetune.budget import Proposal, budget, others
from upcycle.finetune.setup import Setup
from upcycle.finetune.step import take_step
from upcycle.finetune.validation import look, measure

STEPS = 2
"""That are taken at most."""
QUICK_SECONDS = 10.0
"""A first step that took less is followed by another, which is timed instead: the first one also
makes room for what the others use again."""


def propose(setup: Setup) -> Proposal:
    """By one validation and a step or two, which change the model in memory and nothing else.

    Raises:
        Diverged: a loss or a gradient is no number.
    """
    start = time.monotonic()
    ratio = measure(setup)["validation"].get("perplexity_ratio")
    validation_seconds = time.monotonic() - start
    step_seconds = _timed_step(setup, 0)
    if step_seconds < QUICK_SECONDS:
        step_seconds = _timed_step(setup, 1)
    seen = look(setup, step_seconds, validation_seconds, ratio)
    other = tuple(budget(settings, seen) for settings in others(setup.settings))
    held = sum(used.tokens for used in setup.train.used)
    return Proposal(budget(setup.settings, seen), other, held)


def _timed_step(setup: Setup, step: int) -> float:
    start = time.monotonic()
    take_step(setup, step)
    return time.monotonic() - start
