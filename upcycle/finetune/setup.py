"""All that the steps of a run need, and how far it is."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from upcycle.finetune.activations import ActivationTap
from upcycle.finetune.alarms import new_alarms
from upcycle.finetune.budget import Budget
from upcycle.finetune.data import Data
from upcycle.finetune.gating.base import Gater
from upcycle.finetune.partition import Dealer
from upcycle.finetune.router_terms import RouterTerms
from upcycle.finetune.routers import RouterTap, Scale
from upcycle.finetune.settings import Training
from upcycle.finetune.teacher import Teacher
from upcycle.models.blocks import MoEBlock
from upcycle.models.train_log import log_text

Row = dict[str, Any]
"""A line of train_log.jsonl, as plain values."""


@dataclass(frozen=True)
class Setup:
    """All that the steps need. The model and the optimizer are as accelerate prepared them."""

    settings: Training
    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    teacher: Teacher | None
    blocks: list[MoEBlock]
    scales: list[Scale]
    tap: RouterTap
    activations: ActivationTap | None
    """Of a dense model that got others."""
    gater: Gater | Dealer | None
    router_terms: RouterTerms
    train: Data
    validation: Data
    folder: Path
    """Where the state grows."""
    log_file: Path
    watch: Callable[[Row, int, int], None]
    """Told of every line of the log, the steps done and all steps."""
    say_budget: Callable[[Budget], None]
    """Told what the run takes, once that is known."""

    @property
    def plain(self) -> Any:
        """The model without what accelerate wrapped it in."""
        return self.accelerator.unwrap_model(self.model)


@dataclass
class Progress:
    """How far a run is: all that its steps change besides the model and the optimizer."""

    step: int = 0
    """Steps that are done."""
    seconds: float = 0.0
    """That they took."""
    best: float = math.inf
    """The lowest objective of a validation so far; infinite before the first."""
    best_step: int = 0
    log: list[Row] = field(default_factory=list)
    alarmed: set[str] = field(default_factory=set)
    """What alarms were given about."""
    stop: bool = False
    """Set from outside: save after this step and leave."""


def note(setup: Setup, progress: Progress, row: Row) -> None:
    """Add a line to the log, with the alarms that it gives cause for."""
    progress.log.append(row)
    routers_train = setup.settings.train != "experts"
    alarms = new_alarms(progress.log, progress.alarmed, routers_train=routers_train)
    if alarms:
        row["alarms"] = [asdict(alarm) for alarm in alarms]
        progress.alarmed |= {alarm.about for alarm in alarms}
    if setup.accelerator.is_main_process:
        with setup.log_file.open("a") as file:
            file.write(log_text(row))
    texts = {f"perplexity of {name}": value for name, value in row.get("texts", {}).items()}
    flat = row | row.get("validation", {}) | row.get("routing", {}) | texts
    numbers = {k: v for k, v in flat.items() if isinstance(v, int | float) and k != "step"}
    setup.accelerator.log(numbers, step=row["step"])
    setup.watch(row, progress.step, setup.settings.total_steps)
