"""What a run costs on this machine and what it may bring, by its first step."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from upcycle.evaluation.verdict import LAW_TOKENS, healed
from upcycle.finetune.settings import Training

FACTORS = (0.25, 0.5, 1, 2, 4, 8)
"""Budgets that are proposed, over the one that was asked for."""


@dataclass(frozen=True)
class Budget:
    """Tokens, time and what they may bring."""

    tokens: int
    """Of all steps; of a text that holds less, some come again."""
    steps: int
    step_seconds: float
    """That a step took here."""
    validation_seconds: float
    """That one validation took."""
    validations: int
    """After steps; one more comes before them."""
    ratio: float | None
    """Perplexity over the teacher's on the held-out text before training; None without one."""
    expected: float | None
    """About the same after it, by runs of another model; None where they say nothing of it."""

    @property
    def seconds(self) -> float:
        """All of it, but for loading and writing."""
        return self.steps * self.step_seconds + (self.validations + 1) * self.validation_seconds

    def plain(self) -> dict[str, Any]:
        """As plain values, with what follows from them."""
        return asdict(self) | {"seconds": self.seconds}


@dataclass(frozen=True)
class Proposal:
    """The budget that was asked for, and others of the same run."""

    asked: Budget
    others: tuple[Budget, ...]
    """Shorter and longer ones."""
    held: int
    """Tokens of the text that the run which was asked for would train on, perhaps several times."""

    def plain(self) -> dict[str, Any]:
        others = [other.plain() for other in self.others]
        return self.asked.plain() | {"held": self.held, "others": others}


def budget(
    settings: Training, step_seconds: float, validation_seconds: float, ratio: float | None
) -> Budget:
    """Of a run.

    Args:
        ratio: perplexity over the teacher's before training.
    """
    steps, tokens = settings.total_steps, settings.total_steps * settings.step_tokens
    whole = settings.train == "all" and not settings.lora and settings.activation is None
    known = settings.distill and whole
    foretold = ratio is not None and ratio > 1 and known and tokens >= LAW_TOKENS
    return Budget(
        tokens=tokens,
        steps=steps,
        step_seconds=step_seconds,
        validation_seconds=validation_seconds,
        validations=-(-steps // settings.validation_steps),
        ratio=ratio,
        expected=healed(ratio, tokens) if ratio is not None and foretold else None,
    )


def others(settings: Training) -> Iterator[Training]:
    """Runs that differ in their length alone."""
    for factor in FACTORS:
        steps = round(factor * settings.total_steps)
        if steps and factor != 1:
            yield settings.model_copy(update={"tokens": None, "steps": steps})
