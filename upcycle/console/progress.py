"""Bars of long work."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from upcycle.console.output import err

if TYPE_CHECKING:
    from upcycle.core.progress import Progress as OnProgress


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator["OnProgress"]:
    """A bar per stage on a terminal, a line per stage elsewhere, nothing when quiet."""
    if quiet:
        yield lambda stage, done, total: None
    elif not err.is_terminal:
        yield _print_stage_once()
    else:
        columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=err) as bars:
            tasks: dict[str, Any] = {}

            def advance(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total)
                bars.update(tasks[stage], completed=done, total=total)

            yield advance


def _print_stage_once() -> "OnProgress":
    seen: set[str] = set()

    def advance(stage: str, done: int, total: int) -> None:
        if stage not in seen:
            seen.add(stage)
            sys.stderr.write(f"{stage} …\n")

    return advance
