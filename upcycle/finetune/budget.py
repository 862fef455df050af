"""What a run costs on this machine and what it may bring, by its first step."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from upcycle.evaluation.verdict import LAW_PASSES, LAW_TOKENS, healed
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
    validation_tokens: int
    """That each of them reads."""
    teacher_seconds: float
    """For what the teacher predicts once, before all steps."""
    ratio: float | None
    """Perplexity over the teacher's on the held-out text before training; None without one."""
    passes: float | None
    """Times that the text is read; None where nobody knows how much it holds."""
    expected: float | None
    """About the same after it, by runs of another model; None where they say nothing of it."""

    @property
    def seconds(self) -> float:
        """All of it, but for loading and writing."""
        return self.steps * self.step_seconds + self.measuring_seconds + self.teacher_seconds

    @property
    def measuring_seconds(self) -> float:
        """Of it, those of all validations."""
        return (self.validations + 1) * self.validation_seconds

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


@dataclass(frozen=True)
class Look:
    """What a run has shown of itself at first, by which others like it are foretold."""

    settings: Training
    trained: int
    """Sequences that there are to train on."""
    tokens: int | None
    """That the text holds to train on, if that is known; many of them may not be asked for."""
    held: int
    """Sequences that are validated on."""
    held_tokens: int
    """In these."""
    step_seconds: float
    validation_seconds: float
    sequence_seconds: float
    """For each sequence that the teacher reads once."""
    ratio: float | None
    """Perplexity over the teacher's before training; None without one."""


def budget(settings: Training, look: Look) -> Budget:
    """Of a run, by a look at it or at one that differs in its length alone."""
    steps, sequences = settings.total_steps, settings.total_steps * settings.batch_size
    share = settings.held_tokens / look.settings.held_tokens
    if look.trained < look.settings.total_steps * settings.batch_size:  # all of the text
        kinds = 1 if settings.validate_also is None else 2
        share = min(1.0, kinds * settings.held_tokens / look.held_tokens)
        sequences = min(sequences, look.trained)
    tokens = steps * settings.step_tokens
    passes = None if look.tokens is None else tokens / look.tokens
    once = share * look.held + (sequences if settings.teacher_top_k else 0)
    return Budget(
        tokens=tokens,
        steps=steps,
        step_seconds=look.step_seconds,
        validation_seconds=share * look.validation_seconds,
        validations=-(-steps // settings.validation_steps),
        validation_tokens=round(share * look.held_tokens),
        teacher_seconds=once * look.sequence_seconds,
        ratio=look.ratio,
        passes=passes,
        expected=_expected(settings, look.ratio, passes),
    )


def _expected(settings: Training, ratio: float | None, passes: float | None) -> float | None:
    tokens = settings.total_steps * settings.step_tokens
    whole = settings.train == "all" and not settings.lora and settings.activation is None
    known = settings.distill and whole and tokens >= LAW_TOKENS and (passes or 1) <= LAW_PASSES
    return healed(ratio, tokens) if ratio is not None and ratio > 1 and known else None


def others(settings: Training) -> Iterator[Training]:
    """Runs that differ in their length alone."""
    for factor in FACTORS:
        steps = round(factor * settings.total_steps)
        if steps and factor != 1:
            yield settings.model_copy(update={"tokens": None, "steps": steps})
