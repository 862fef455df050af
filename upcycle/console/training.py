"""Training: what it would take, how it goes, and what it changed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from upcycle.console.output import err, out, table
from upcycle.core.flags import as_flags
from upcycle.core.words import count, duration
from upcycle.evaluation.verdict import LAW_MODELS, LAW_PASSES, LAW_TOKENS
from upcycle.finetune.catalogue import methods as of_training

if TYPE_CHECKING:
    from upcycle.finetune.budget import Budget, Proposal
    from upcycle.finetune.finished import Finetuning
    from upcycle.finetune.preparing import Watch
    from upcycle.finetune.settings import Training
    from upcycle.models.record.training import Used

AGAIN = 1.1
"""Times that a text is read from which on that is worth a word."""


@contextmanager
def watching_training(*, quiet: bool) -> Iterator["Watch"]:
    """What trains, then a live line on a terminal, and a line per validation."""
    from upcycle.finetune.preparing import Watch

    if quiet:
        yield Watch()
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as bars:
        task = bars.add_task("", total=None)

        def row(row: dict[str, Any], done: int, total: int) -> None:
            if "validation" in row:
                err.print(f"step {row['step']} of {total}: {_validated(row)}", highlight=False)
            else:
                bars.update(task, completed=done, total=total, description=_training_line(row))
            for alarm in row.get("alarms", ()):
                err.print(_alarm(alarm["step"], alarm["says"]), highlight=False)

        def teacher(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total, description="the teacher reads")

        yield Watch(begin=show_groups, row=row, budget=_say_budget, teacher=teacher)


def _say_budget(budget: "Budget") -> None:
    """What a run takes and may bring, once its first step is done."""
    rate = budget.tokens / budget.steps / budget.step_seconds
    err.print(
        f"budget: {budget.tokens:,} tokens in about {duration(budget.seconds)} here, by the first "
        f"step ({rate:.0f} tokens/s) and {budget.validations + 1} validations of "
        f"{budget.validation_tokens:,} ({budget.measuring_seconds / budget.seconds:.0%} of that).",
        highlight=False,
    )
    err.print(f"expected: {_expected(budget)}", highlight=False)


def _expected(budget: "Budget") -> str:
    """What a run may bring, and how that is known."""
    if budget.expected is None:
        return (
            f"nobody knows: only runs of heal on {LAW_TOKENS:,} tokens and more, where everything "
            "trains and the dense model teaches one that is worse than it, were measured, none of "
            f"which read its text more than {LAW_PASSES} times."
        )
    return (
        f"perplexity on the held-out text from {budget.ratio:.2f} to about {budget.expected:.2f} × "
        f"the dense model's. This is an estimate from {LAW_MODELS} alone."
    )


def show_proposal(proposal: "Proposal") -> None:
    """What the run that was asked for would take and may bring, and longer and shorter ones."""
    asked = proposal.asked

    def row(budget: "Budget") -> tuple[str, ...]:
        expected = "–" if budget.expected is None else f"{budget.expected:.2f} ×"
        mark = "asked for" if budget is asked else ""
        held = f"{budget.validations + 1} × {budget.validation_tokens:,}"
        return f"{budget.steps:,}", held, duration(budget.seconds), expected, mark

    each = sorted((asked, *proposal.others), key=lambda budget: budget.tokens)
    rows = {f"{budget.tokens:,}": row(budget) for budget in each}
    table("tokens, and what they take here", rows, "steps", "held out", "time", "perplexity", "")
    again, longest = "", each[-1]
    if longest.passes and longest.passes > AGAIN:
        text = count(round(longest.tokens / longest.passes))
        again = f" The text holds about {text} tokens to train on, which would be read "
        again += f"{asked.passes:.1f} times, by the longest {longest.passes:.1f} times."
    teacher = ""
    if asked.teacher_seconds:
        teacher = f", what the teacher predicts once takes {duration(asked.teacher_seconds)}"
    out.print(
        f"Timed by a step of {asked.step_seconds:.2g} s and a validation of "
        f"{asked.validation_seconds:.2g} s ({asked.measuring_seconds / asked.seconds:.0%} of the "
        f"time goes to those){teacher}; loading and writing come on top.{again}",
        highlight=False,
    )
    out.print(f"Expected: {_expected(asked)}", highlight=False)


def _validated(row: Mapping[str, Any]) -> str:
    """What a validation has shown; each text's perplexity where there are several."""
    measured = ", ".join(f"{k} {v:.4g}" for k, v in row["validation"].items())
    each = ", ".join(f"{escape(name)} {value:.4g}" for name, value in row["texts"].items())
    return f"validation {measured}" + (f" ({each})" if len(row["texts"]) > 1 else "")


def _alarm(step: int, says: str) -> str:
    return f"[bold yellow]alarm[/] after step {step}: {escape(as_flags(says))}."


def _training_line(row: Mapping[str, Any]) -> str:
    losses = [method["name"] for method in of_training() if method["kind"] == "router loss"]
    names = ("next_token", "distill", "match_layers", "hoyer", *losses)
    parts = [f"{name.replace('_', ' ')} {row[name]:.4g}" for name in names if name in row]
    if "imbalance" in row:
        parts.append(f"busiest expert {row['imbalance']:.2f} × fair share")
    return ", ".join([*parts, f"{row['tokens_per_second']:.0f} tokens/s"])


def show_groups(
    settings: "Training", groups: Mapping[str, Mapping[str, int]], used: "Sequence[Used]"
) -> None:
    """What trains, and on how much of each text, before the first step."""
    rows = {
        name: (count(row["parameters"]), count(row["trained"]) if row["trained"] else "–")
        for name, row in groups.items()
    }
    how = f"low-rank changes of rank {settings.lora}" if settings.lora else "the weights themselves"
    table(f"trained: {how}, preset {settings.name}", rows, "parameters", "trained")
    err.print(f"learning rate: {settings.rate:g} at most.", highlight=False)
    for text in used:
        err.print(_share(text), highlight=False)


def _share(used: "Used") -> str:
    """How much of a text is trained on, in a sentence."""
    if used.total is None:
        part = f"the first {used.tokens:,} tokens train, the next {used.held_out:,} validate"
    else:
        share = f"{100 * used.tokens / used.total:.2g} %"
        part = (
            f"{used.tokens:,} of about {used.total:,} tokens ({share}) train, from all over it; "
            f"{used.held_out:,} from its end validate"
        )
    return f"{escape(used.text)}: {part}."


def show_finetuning(done: "Finetuning") -> None:
    """What training changed and what it cost."""
    from upcycle.models.config import read_config
    from upcycle.models.families import auto_class

    rows = {
        name.replace("_", " "): (f"{value:.4f}", f"{done.after[name]:.4f}")
        for name, value in done.before.items()
    }
    total = done.settings.total_steps
    if len(done.texts) > 1:
        rows |= {
            f"perplexity of {name}": (f"{before:.4f}", f"{after:.4f}")
            for name, (before, after) in done.texts.items()
        }
    if done.zeros is not None:
        zeros = done.zeros
        rows |= {
            "activations that are 0": (f"{zeros.before:.2%}", f"{zeros.after:.2%}"),
            "with the former activation": (f"{zeros.original:.2%}", ""),
        }
    if "dead" in done.last:
        rows["dead experts"] = ("", f"{done.last['dead']} in the last step")
    rows |= {
        "kept": ("", f"the state after step {done.result_step} of {total}"),
        "tokens": ("", f"{done.tokens:,}"),
        "time": ("", f"{done.seconds:.0f} s, {done.tokens / done.seconds:.0f} tokens/s"),
        "alarms": ("", ", ".join(alarm.about for alarm in done.alarms) or "none"),
    }
    table(f"{done.model}, on held-out text of {done.settings.data}", rows, "before", "after")
    for alarm in done.alarms:
        out.print(_alarm(alarm.step, alarm.says), highlight=False)
    objective = done.settings.objective
    if objective(done.after) >= objective(done.before):
        out.print(
            "[bold yellow]Training made it no better[/]: lower --lr, or give more --tokens.",
            highlight=False,
        )
    how = (
        "loads with peft"
        if done.settings.lora and not done.settings.merge
        else f"loads with {auto_class(read_config(done.out)).__name__}.from_pretrained"
    )
    out.print(f"[bold]{escape(str(done.out))}[/] {how}", highlight=False)
