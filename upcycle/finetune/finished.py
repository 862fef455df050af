"""A finished training run, and what is to be known of it."""

from dataclasses import dataclass
from pathlib import Path

from upcycle.finetune.settings import Training
from upcycle.finetune.setup import Row
from upcycle.finetune.trainable import Groups
from upcycle.models.record.training import Alarm, TrainingResult, TrainingSettings, Used, Zeros


@dataclass(frozen=True)
class Finetuning:
    """A finished training run."""

    model: str
    out: Path
    settings: Training
    groups: Groups
    used: tuple[Used, ...]
    log: list[Row]
    result_step: int
    """Whose state the result is."""
    tokens: int
    seconds: float
    processes: int
    zeros: Zeros | None = None
    reload_error: float | None = None
    """Root mean square difference of the written checkpoint's logits from the trained model's,
    over their standard deviation."""

    @property
    def before(self) -> dict[str, float]:
        return self._validation(0)

    @property
    def after(self) -> dict[str, float]:
        return self._validation(self.result_step)

    @property
    def texts(self) -> dict[str, tuple[float, float]]:
        """Perplexity of the held-out part of each text, before and after."""
        before, after = (self._validated(step)["texts"] for step in (0, self.result_step))
        return {name: (perplexity, after[name]) for name, perplexity in before.items()}

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        return tuple(Alarm(**alarm) for row in self.log for alarm in row.get("alarms", ()))

    @property
    def last(self) -> Row:
        """The line of the last step."""
        return [row for row in self.log if "validation" not in row][-1]

    def _validation(self, step: int) -> dict[str, float]:
        measured: dict[str, float] = self._validated(step)["validation"]
        return measured

    def _validated(self, step: int) -> Row:
        return [row for row in self.log if "validation" in row and row["step"] == step][-1]


def finetuning_summary(done: Finetuning) -> TrainingResult:
    """What is to be known of a run, without its log, here: with the places on this machine."""
    return TrainingResult(
        model=done.model,
        out=str(done.out),
        settings=TrainingSettings.model_validate(done.settings.settings()),
        groups=done.groups,
        used=done.used,
        before=done.before,
        after=done.after,
        step=done.result_step,
        steps=done.settings.total_steps,
        tokens=done.tokens,
        seconds=round(done.seconds, 3),
        processes=done.processes,
        texts=done.texts,
        zeros=done.zeros,
        alarms=done.alarms,
        reload_error=done.reload_error,
    )
