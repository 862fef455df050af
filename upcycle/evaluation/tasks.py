"""Benchmark tasks, handed over to EleutherAI's lm-eval, which is an optional extra."""

import difflib
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import reason

TaskScores = dict[str, dict[str, tuple[float | None, float | None]]]
"""Per task and metric: the model's value, then that of the one it is compared with, or None."""


@dataclass(frozen=True)
class Tasks:
    """Tasks whose data are here."""

    names: list[str]
    manager: Any
    """lm-eval's index of tasks, which takes seconds to build."""


def open_tasks(names: list[str]) -> Tasks:
    """Find the tasks and fetch their data.

    Args:
        names: tasks, groups or tags of lm-eval, or task files (.yaml).

    Raises:
        UpcycleError: lm-eval is not installed, a task is unknown or its data can't be had.
    """
    try:
        from lm_eval.tasks import TaskManager, get_task_dict
    except ImportError as error:
        raise UpcycleError("`tasks` needs `pip install upcycle[eval]`") from error
    with redirect_stdout(sys.stderr):  # ours is for the result
        manager = TaskManager()
        for name in names:
            if name not in manager.all_tasks and not Path(name).is_file():
                raise UpcycleError(
                    f"`tasks={name!r}` is no task of lm-eval{_nearest(name, manager)}"
                )
        try:
            get_task_dict(names, manager)
        except Exception as error:  # whatever a task's own code and the datasets library raise
            raise UpcycleError(
                f"`tasks={','.join(names)}` can't be loaded (their data come from the hub): "
                f"{reason(error)}"
            ) from error
    return Tasks(names, manager)


def run_tasks(
    tasks: Tasks,
    folder: Path,
    against: Path | None,
    *,
    adapter: Path | None = None,
    dtype: str,
    device: str,
    batch_size: int,
) -> TaskScores:
    """Run the tasks on the model in a folder, and on the one it is compared with.

    Args:
        adapter: the folder of low-rank changes of the first model.

    Raises:
        UpcycleError: lm-eval fails.
    """
    own = {"pretrained": str(folder)} | ({"peft": str(adapter)} if adapter else {})
    mine = _scores(tasks, own, dtype, device, batch_size)
    other = (
        _scores(tasks, {"pretrained": str(against)}, dtype, device, batch_size) if against else {}
    )
    return {
        task: {name: (value, other.get(task, {}).get(name)) for name, value in metrics.items()}
        for task, metrics in mine.items()
    }


def _scores(
    tasks: Tasks, model: dict[str, str], dtype: str, device: str, batch_size: int
) -> dict[str, dict[str, float]]:
    """Per task and metric."""
    from lm_eval import simple_evaluate

    with redirect_stdout(sys.stderr):
        try:
            results = simple_evaluate(
                model="hf",
                model_args=model
                | {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True},
                tasks=tasks.names,
                task_manager=tasks.manager,
                batch_size=batch_size,
                device=device,
            )
        except Exception as error:  # as above
            raise UpcycleError(
                f"`tasks={','.join(tasks.names)}`: lm-eval fails on {model['pretrained']}: "
                f"{reason(error)}"
            ) from error
    return {task: _numbers(metrics) for task, metrics in results["results"].items()}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """lm-eval's metrics are named `metric,filter`, and stand beside words."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and "," in name
    }


def _nearest(name: str, manager: Any) -> str:
    """The tail of an error about an unknown task. There are thousands: only the likeliest."""
    nearest = difflib.get_close_matches(name, manager.all_tasks, n=3)
    return f", did you mean {' or '.join(nearest)}?" if nearest else ": see `lm-eval ls tasks`"
