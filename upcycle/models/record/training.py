"""What a training run did and measured."""

from dataclasses import dataclass

from pydantic import FiniteFloat

from upcycle.models.record.check import Check
from upcycle.models.record.part import Measured, Part


@dataclass(frozen=True)
class Used:
    """How much of a text is trained on."""

    text: str
    tokens: int
    held_out: int
    """Tokens of its end, on which it is validated."""
    total: int | None
    """That the text holds; roughly, of a long one; None: nobody knows."""


@dataclass(frozen=True)
class Alarm:
    """What went wrong while a model was trained."""

    step: int
    """After which it was noticed."""
    about: str
    """What it is about; nothing is said twice."""
    says: str
    """What was measured and what to do, in a sentence without its end."""


class TrainingSettings(Part):
    """The settings of a training run, of which those are named here that others read."""

    name: str
    data: str
    teacher: str | None = None


class Zeros(Part):
    """Of what the activations of a dense model put out for the held-out text, the share that is
    exactly zero."""

    original: float
    """With the activation that the model came with."""
    before: float
    """With the new one, before training."""
    after: float
    """With the new one, after it."""


class TrainingResult(Part):
    """What a training run did and measured."""

    model: str
    out: str
    settings: TrainingSettings
    groups: dict[str, dict[str, int]]
    """Per group, how many parameters it has, and how many train."""
    used: tuple[Used, ...] = ()
    before: dict[str, Measured]
    after: dict[str, Measured]
    step: int
    """Whose state was kept."""
    steps: int
    tokens: int
    seconds: FiniteFloat
    processes: int
    texts: dict[str, tuple[Measured, Measured]] = {}
    """Perplexity of the held-out part of each text, before and after."""
    zeros: Zeros | None = None
    """Where a dense model got another activation."""
    alarms: tuple[Alarm, ...] = ()
    reload_error: float | None
    """Root mean square difference of the written checkpoint's logits from the trained model's,
    over their standard deviation."""


class TrainingRun(TrainingResult):
    """A training run, as the record of its result tells of it."""

    upcycle: str
    """The version."""
    check_before: Check | None
    """What the conversion measured, which is no longer true of the trained weights."""
