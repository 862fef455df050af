"""What people see: progress bars and tables, through rich. No logic."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from upcycle.conversion.catalogue import UNMEASURED
from upcycle.core.flags import as_flags
from upcycle.core.paths import public_name
from upcycle.core.words import count, duration, size
from upcycle.evaluation.verdict import LAW_MODEL, LAW_TOKENS, verdict
from upcycle.finetune.catalogue import methods as of_training
from upcycle.models.record import EncoderReport
from upcycle.models.text import kind_name

if TYPE_CHECKING:
    from upcycle.conversion.card import Conversion
    from upcycle.conversion.plan import Plan
    from upcycle.core.progress import Progress as OnProgress
    from upcycle.evaluation.encoders import HiddenEvaluation
    from upcycle.evaluation.run import Evaluation, TextResult
    from upcycle.evaluation.tasks import TaskScores
    from upcycle.finetune.budget import Budget, Proposal
    from upcycle.finetune.publish import Finetuning
    from upcycle.finetune.run import Watch
    from upcycle.finetune.settings import Training
    from upcycle.models.record import Beside, Findings, HiddenResult, Report, Used

LONGEST_WORD = 14
"""Letters of a heading that are never cut."""
TEXTS_AT_ONCE = 4
"""Columns of texts that a terminal has room for."""
AGAIN = 1.1
"""Times that a text is read from which on that is worth a word."""
COLOURS = {"fine": "bold green", "heal": "bold yellow", "broken": "bold red"}
out = Console(emoji=False)  # :name: may be part of a file's name
err = Console(stderr=True, emoji=False)


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


@contextmanager
def watching_training(*, quiet: bool) -> Iterator["Watch"]:
    """What trains, then a live line on a terminal, and a line per validation."""
    from upcycle.finetune.run import Watch

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
            "trains and the dense model teaches one that is worse than it, were measured."
        )
    return (
        f"perplexity on the held-out text from {budget.ratio:.2f} to about {budget.expected:.2f} × "
        f"the dense model's. This is an estimate from {LAW_MODEL} alone."
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
    again = ""
    if asked.tokens > AGAIN * proposal.held:
        times = asked.tokens / proposal.held
        again = (
            f" The text holds {proposal.held:,} to train on, which would be read {times:.1f} times."
        )
    teacher = ""
    if asked.teacher_seconds:
        teacher = f", the teacher runs once for {duration(asked.teacher_seconds)}"
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
    if done.after["loss"] >= done.before["loss"] and not done.settings.distill:
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


def show_push(url: str, *, quiet: bool) -> None:
    """Where the result is; beside a JSON object, not on stdout."""
    (err if quiet else out).print(f"Pushed to {url}", highlight=False, markup=False)


def _print_stage_once() -> "OnProgress":
    seen: set[str] = set()

    def advance(stage: str, done: int, total: int) -> None:
        if stage not in seen:
            seen.add(stage)
            sys.stderr.write(f"{stage} …\n")

    return advance


def table(title: str, rows: Mapping[str, Any], *headings: str) -> None:
    """Rows of a name and one or more values, which are no markup: files have any names."""
    grid = Table(
        title=Text(title), title_justify="left", show_header=bool(headings), title_style="bold"
    )
    grid.add_column("", overflow="fold")
    for heading in headings or ("",):
        # A narrow terminal must not cut a word; a file's name may be longer than it has room for.
        one_word = " " not in heading and 0 < len(heading) <= LONGEST_WORD
        grid.add_column(
            heading, justify="right" if headings else "left", overflow="fold", no_wrap=one_word
        )
    for name, values in rows.items():
        cells = values if isinstance(values, tuple) else (values,)
        texts = (c if isinstance(c, Text) else Text(as_flags(str(c))) for c in (name, *cells))
        grid.add_row(*texts)
    out.print(grid)


def show_plan(plan: "Plan") -> None:
    """What would be built, and what each target says."""
    from upcycle.conversion.memory import peak_bytes

    recipe = plan.recipe
    out.print(plan.way.usage(plan.design.geometry), highlight=False)
    table(
        f"{plan.source.label} → {plan.target}",
        {
            "method": _method(plan),
            "experts": _experts(plan) + _chosen(plan),
            "layers": _layers(plan),
            "active FFN": f"{100 * plan.active_ffn_ratio:.0f} % of the dense model's",
            "parameters": f"{count(plan.params_total)} (dense {count(plan.params_dense)})",
            "active per token": count(plan.params_active),
            "combine": "unweighted sum" if plan.design.combine == "sum" else "weighted mean",
            "output": f"{size(plan.bytes)} in {str(plan.design.dtype).removeprefix('torch.')}",
            "calibration": f"{plan.fit_tokens:,} tokens of {recipe.calibration}"
            if plan.streams
            else "not needed",
            **_backward_pass(plan),
            "memory": f"about {size(peak_bytes(plan))}"
            + (f", the check {size(plan.check_bytes())}" if recipe.check != "none" else ""),
        },
    )
    table("targets", {name: why or "ok" for name, why in plan.targets.items()})
    table("runtimes", {name: why or "ok" for name, why in plan.runtimes.items()})
    _show_notes(plan.warnings)


def show_warnings(plan: "Plan") -> None:
    """What is to be known before a conversion begins."""
    refusals = ((name, why) for name, why in plan.runtimes.items() if why)
    _show_notes(plan.warnings)
    _show_notes(f"{name} does not run this {plan.target}: {why}" for name, why in refusals)


def _show_notes(notes: Iterable[str]) -> None:
    for note in notes:
        err.print(f"[yellow]note[/]: {escape(as_flags(note))}", highlight=False)


def _method(plan: "Plan") -> str:
    design = plan.design
    refit = f", compensation {design.methods.compensate.name}" if design.compensates else ""
    order = ", layer by layer" if design.sequential else ""
    return f"{plan.way.made(design)}{refit}{order}"


def _backward_pass(plan: "Plan") -> dict[str, str]:
    if not plan.needs_gradients:
        return {}
    aside = size(plan.gradient_bytes)
    return {
        "backward pass": "through the dense model, one layer's weights in memory at a time, "
        f"{aside} put aside on the disk"
    }


def _experts(plan: "Plan") -> str:
    geometry = plan.design.geometry
    copies = f" ({geometry.copies} copies)" if geometry.granularity > 1 else ""
    shared = f", and {geometry.shared_size} always on" if geometry.shared_size else ""
    return (
        f"{geometry.top_k} of {geometry.num_experts}{copies} per token, {geometry.expert_size} "
        f"neurons each{shared}"
    )


def _chosen(plan: "Plan") -> str:
    if plan.request.experts is not None or not plan.way.fewer:
        return ""
    number = plan.design.geometry.num_experts
    return f" (--experts {number} by default: more lose less, fewer are {plan.way.fewer})"


def _layers(plan: "Plan") -> str:
    dense = plan.spec.dense_layers
    if plan.undecided:
        return f"{len(plan.moe_layers)}, less those that convert measures to be better kept dense"
    kept = f", {len(dense)} kept dense ({', '.join(map(str, dense))})" if dense else ""
    return f"{len(plan.moe_layers)} converted{kept}"


def show_conversion(conversion: "Conversion") -> None:
    """What changed and what it cost."""
    plan, check = conversion.plan, conversion.check
    rows: dict[str, Any] = {
        "parameters": (count(plan.params_dense), count(plan.params_total)),
        "active per token": (count(plan.params_dense), count(plan.params_active)),
        "active FFN": ("100 %", f"{100 * plan.active_ffn_ratio:.0f} %"),
        "layers": ("", _layers(plan)),
    }
    if check is not None:
        loads = [share for layer in check.load for share in layer]
        rows |= {
            "expert load": ("", f"{min(loads):.2f} to {max(loads):.2f} × fair share"),
            "dead experts": ("", f"{check.dead_experts} of {len(loads)}"),
        }
    rows["peak memory"] = ("", size(conversion.peak_bytes))
    out.print(plan.way.usage(plan.design.geometry), highlight=False)
    table(f"{plan.source.label} → {plan.target}", rows, "dense", "MoE")
    took = ", ".join(f"{name} {s:.0f} s" for name, s in conversion.seconds.items())
    out.print(f"Made: {_method(plan)}. Took: {took}.", highlight=False)
    if conversion.learned:
        out.print(f"Fit: {conversion.learned}", highlight=False)
    _show_trials(conversion)
    if check is not None:
        out.print(f"Exactness: {_exactness(conversion)}.", highlight=False)
        _show_kinds(check)
        what = "Hidden states" if isinstance(check, EncoderReport) else "Perplexity"
        out.print(
            f"{what} on {check.tokens:,} tokens that nothing was fitted on, windows of "
            f"{check.window}."
            + "".join(f" Left out: {escape(kind_name(kind))}." for kind in check.left_out),
            highlight=False,
        )
        for sentence in _verdict(conversion):
            out.print(sentence, highlight=False)
    else:
        out.print("Not checked (--check none).", highlight=False)
    if conversion.findings is not None:
        _show_findings(conversion.findings, public_name(plan.source.label))
    loader = plan.source.arch.loader
    out.print(
        f"[bold]{escape(str(conversion.out))}[/] loads with {loader}.from_pretrained",
        highlight=False,
    )


def _show_findings(found: "Findings", base: str) -> None:
    """What a merge has shown of its models."""
    if found.distances is not None:
        rows = {
            source.model: (_share_of(source.ffn), _share_of(source.rest))
            for source in found.distances.sources
        }
        table(f"how far from {base}, in its own length", rows, "FFNs", "rest")
    for sentence in found.sentences:
        out.print(escape(as_flags(sentence)), highlight=False)
    if found.perplexities is not None:
        _show_beside(found.perplexities)
    _show_notes(found.notes)


def _share_of(value: float) -> str:
    return f"{100 * value:.3g} %"


def _show_beside(beside: "Beside") -> None:
    """The perplexities of a merge and its models, some texts at a time."""
    for start in range(0, len(beside.texts), TEXTS_AT_ONCE):
        some = slice(start, start + TEXTS_AT_ONCE)
        rows = {
            row.model: tuple(f"{value:.2f}" for value in row.perplexity[some])
            for row in beside.models
        }
        title = "perplexity on the experts' texts, which nothing was fitted on"
        table(title, rows, *map(kind_name, beside.texts[some]))


def _exactness(conversion: "Conversion") -> str:
    check = conversion.check
    if check is None or check.exact_error is None:
        return f"not expected: {conversion.plan.way.changed}"
    plan, what = conversion.plan, "all experts on"
    if plan.exact == "logits":
        what = "copies"
    elif not plan.partitions:
        what += ", repeated neurons in both"
    if plan.design.refits:
        what += ", refit weights in both"
    return f"ok, {what}: {plan.source.arch.output} differ by {check.exact_error:.1g} σ"


def _show_trials(conversion: "Conversion") -> None:
    """What the choices of dense layers are worth; and what the one that was made costs."""
    found, plan = conversion.dense_layers, conversion.plan
    if found is None:
        return
    tried = ", ".join(
        f"{trial.mean:.2f} × (worst text {trial.worst:.2f} ×) with {_named(trial.layers)}"
        for trial in found.trials
    )
    out.print(f"Dense layers, tried on a few tokens: perplexity {tried}.", highlight=False)
    barred = plan.runtimes_lost
    if barred:
        out.print(
            f"For {_named(found.layers)} dense you lose {' and '.join(barred)}: "
            f"--keep-dense none gives {'it' if len(barred) == 1 else 'them'} back.",
            highlight=False,
        )


def _named(layers: tuple[int, ...]) -> str:
    if not layers:
        return "none"
    return f"layer{'s' if len(layers) > 1 else ''} {' and '.join(map(str, layers))}"


def _show_kinds(check: "Report") -> None:
    """A row per kind of text, the worst in the colour of what it means."""
    if isinstance(check, EncoderReport):
        _show_hidden_texts("text", check.kinds)
        return
    colour = COLOURS[verdict(check.ratios).grade]
    rows = {}
    for name, kind in zip(_told_apart(k.kind for k in check.kinds), check.kinds, strict=True):
        mark = Text(f"{kind.ratio:.2f}", colour if kind is check.worst else "")
        rows[name] = (
            f"{kind.perplexity_dense:.2f}",
            f"{kind.perplexity_moe:.2f}",
            mark,
            f"{kind.worst_window:.2f}",
            f"{100 * kind.top1_agreement:.0f} %",
        )
    table("text", rows, "dense", "MoE", "ratio", "worst window", "same token")


def _verdict(conversion: "Conversion") -> Iterator[str]:
    """What the check means, in sentences."""
    plan, check = conversion.plan, conversion.check
    if check is None:
        return
    if plan.exact == "logits":
        yield "The function is unchanged; train it further so that the copies come to differ."
        return
    if isinstance(check, EncoderReport):
        yield (
            f"Hidden states are off by up to {check.worst.error:.2g} σ, with a cosine of "
            f"{check.worst.cosine:.3f} ({escape(kind_name(check.worst.kind))}): what that costs, "
            "only the task that they are for tells."
        )
        return
    found, worst = verdict(check.ratios), check.worst
    if plan.exact == "nothing":
        yield f"Perplexity is up to {worst.ratio:.2f} × the dense model's until it is trained."
        return
    colour, where = COLOURS[found.grade], f"{worst.ratio:.2f} × the dense model's at worst"
    name = escape(kind_name(worst.kind))
    if found.grade == "fine":
        yield f"[{colour}]Fine as it is[/]: perplexity is {where} ({name})."
        return
    dose = f"about {found.tokens:,} tokens" if found.tokens else "millions of tokens"
    more = "--active" if plan.request.top_k is None else "--top-k"
    how = f"upcycle finetune {escape(str(conversion.out))} --data …"
    if not plan.source.arch.goes_on:
        how = "Train it as its card says,"
    word = "Broken" if found.grade == "broken" else "Heal it"
    yield (
        f"[{colour}]{word}[/]: perplexity is {where} ({name}). {how} with {dose}, or raise {more}."
    )
    if plan.recipe.name == "default" and plan.recipe.method.name == "split":
        yield "A split by --recipe thorough loses less, for several times the time."
    if found.add:
        yield (
            f"{escape(kind_name(found.add))} lost much more than the rest: add such text, "
            f"--calibration {escape(plan.recipe.calibration)}+FILE."
        )


def show_evaluation(report: "Evaluation") -> None:
    """A line per text, then what the model is and does, then tasks."""
    title = report.model if report.against is None else f"{report.model} against {report.against}"
    _show_texts(title, report)
    _show_top_ks(report)
    table("", _routing(report) | _cost(report) | _speed(report))
    if report.tasks is not None:
        _show_tasks(report.tasks, ["model"] if report.against is None else ["model", "dense"])
    out.print(
        f"Measured on {report.tokens:,} tokens of each text, windows of {report.window}.",
        highlight=False,
    )
    for result in report.texts:
        if not math.isfinite(result.perplexity):
            what = f"on {result.text} perplexity is {result.perplexity}: the logits overflow"
            err.print(f"[yellow]note[/]: {escape(what)}", highlight=False)
        if result.fitted:
            what = f"the model was fitted on {result.text}: on other text it may lose more"
            err.print(f"[yellow]note[/]: {escape(what)}", highlight=False)


def show_hidden(report: "HiddenEvaluation") -> None:
    """Of an encoder: a line per text, then what the model is and does."""
    _show_hidden_texts(f"{report.model} against {report.against}", report.texts)
    table("", _routing(report) | _cost(report))
    out.print(
        f"Hidden states on {report.tokens:,} tokens of each text, windows of {report.window}.",
        highlight=False,
    )


def _show_hidden_texts(title: str, texts: "Sequence[HiddenResult]") -> None:
    numbers = {
        name: (
            *(f"{text.error:.3f}", f"{text.worst_window:.3f}"),
            *(f"{text.cosine:.4f}", f"{text.pooled_cosine:.4f}"),
        )
        for name, text in zip(_told_apart(t.kind for t in texts), texts, strict=True)
    }
    table(title, numbers, "error", "worst window", "cosine", "cosine of means")


def _show_texts(title: str, report: "Evaluation") -> None:
    headings = ["perplexity"]
    if report.against is not None:
        headings += ["dense", "ratio", "worst window", "KL, nats", "same next token"]
    rows = {}
    for name, result in zip(_told_apart(r.text for r in report.texts), report.texts, strict=True):
        numbers = [f"{result.perplexity:.3f}"]
        if report.against is not None:
            numbers += [
                f"{result.perplexity_against:.3f}",
                f"{result.perplexity_ratio:.4f}",
                f"{result.worst_window_ratio:.4f}",
                f"{result.kl:.4f}",
                f"{100 * (result.top1_agreement or 0):.1f} %",
            ]
        rows[name] = tuple(numbers)
    table(title, rows, *headings)


def _told_apart(texts: Iterable[str]) -> list[str]:
    """What people read of texts; of files that have the same name, where they lie."""
    given = list(texts)
    names = [kind_name(text) for text in given]
    return [
        text if names.count(name) > 1 else name for text, name in zip(given, names, strict=True)
    ]


def _show_top_ks(report: "Evaluation") -> None:
    """A row for each number of experts per token: what is active, then perplexity on each text, and
    beside the dense model's."""
    if not report.top_ks:
        return

    def cell(result: "TextResult") -> str:
        beside = result.perplexity_ratio
        return f"{result.perplexity:.3f}" + ("" if beside is None else f" ({beside:.3f} ×)")

    rows = {
        f"{at.top_k}{', its own' if at.own else ''}": (
            f"{count(at.active)}, {100 * at.active_share:.0f} %",
            *(cell(result) for result in at.texts),
        )
        for at in report.top_ks
    }
    table("experts per token", rows, "active", *_told_apart(r.text for r in report.texts))
    _show_notes(f"--top-k {at.top_k}: {at.note}" for at in report.top_ks if at.note)


def _show_tasks(scores: "TaskScores", headings: list[str]) -> None:
    def cells(values: tuple[float | None, ...]) -> tuple[str, ...]:
        return tuple("" if value is None else f"{value:.4f}" for value in values[: len(headings)])

    rows = {
        f"{task}, {metric}": cells(values)
        for task, metrics in scores.items()
        for metric, values in metrics.items()
    }
    table("lm-eval", rows, *headings)


def _routing(report: "Evaluation | HiddenEvaluation") -> dict[str, str]:
    if not report.routing:
        return {}
    loads = [share for layer in report.routing for share in layer.load]
    dead = sum(layer.dead for layer in report.routing)
    worst = min(report.routing, key=lambda layer: layer.entropy)
    cosines = [layer.cosine for layer in report.similarity]
    return {
        "MoE layers": f"{len(report.routing)}",
        "expert load": f"{min(loads):.2f} to {max(loads):.2f} × fair share",
        "load entropy": f"{worst.entropy:.3f} at least (layer {worst.layer}); 1 is even",
        "dead experts": f"{dead} of {len(loads)}",
        "expert similarity": f"{sum(cosines) / len(cosines):.3f} (mean cosine; 1 for copies)",
    }


def _cost(report: "Evaluation | HiddenEvaluation") -> dict[str, str]:
    def cell(mine: int, dense: int | None) -> str:
        return count(mine) + ("" if dense is None else f" (dense {count(dense)})")

    params, flops = report.params, report.flops
    return {
        "parameters": cell(params.total, params.total_against),
        "active per token": cell(params.active, params.active_against),
        "FLOPs per token": cell(flops.active, flops.active_against),
    }


def _speed(report: "Evaluation") -> dict[str, str]:
    speed = report.speed
    if speed is None:
        return {}

    def cell(mine: float, dense: float | None) -> str:
        beside = "" if dense is None else f" (dense {dense:.0f}: {mine / dense:.2f} ×)"
        return f"{mine:.0f} tokens/s{beside}"

    return {
        "prefill": cell(speed.prefill, speed.prefill_against),
        "decode": cell(speed.decode, speed.decode_against),
        "timed with": f"batch {speed.batch_size}, {speed.threads} threads, {speed.dtype}, "
        f"experts by {speed.experts_implementation}, {speed.machine}",
    }


def show_inspection(report: Mapping[str, Any]) -> None:
    """A model's facts, then what each target says of it."""
    hidden = {"model", "targets", "traits", "check", "experts_possible", "agreement"}
    rows = {name.replace("_", " "): _fact(v) for name, v in report.items() if name not in hidden}
    rows |= {f"has {trait}": why for trait, why in report.get("traits", {}).items()}
    if "experts_possible" in report:
        rows["--experts with --shared 0"] = ", ".join(map(str, report["experts_possible"]))
    if report.get("check"):
        ratio = report["check"].get("perplexity_ratio")
        off = {"error of hidden states": report["check"].get("hidden_error")}
        named = off if ratio is None else {"perplexity over dense": ratio}
        rows |= {name: f"{value:.3f}" for name, value in named.items()}
    table(str(report["model"]), rows)
    if "targets" in report:
        table("targets", report["targets"])
    if "agreement" in report:
        alike = {f"layer {layer}": f"{index:.2f}" for layer, index in report["agreement"].items()}
        table("how alike the experts are (adjusted Rand index: 0 by chance, 1 the same)", alike)


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 10**6:
        return f"{value:,}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def show_recipes(
    recipes: list[dict[str, Any]], presets: list[dict[str, Any]], methods: list[dict[str, Any]]
) -> None:
    """The shipped recipes, the presets of training, then by kind the methods that a recipe can
    name."""
    _show_listed("recipes", [_described(row, row["method"], _measured(row)) for row in recipes])
    _show_listed("presets of finetune", [_described(row, _measured(row)) for row in presets])
    for kind in dict.fromkeys(method["kind"] for method in methods):
        of_kind = [row for row in methods if row["kind"] == kind]
        called = "perturbation of copies" if kind == "method" else kind
        rows = [_described(row, _defaults(row["parameters"])) for row in of_kind]
        _show_listed(f"methods: {called}", rows)


def show_settings(settings: Mapping[str, Iterable[Mapping[str, str]]]) -> None:
    """By command, every setting with its meaning, its flag if it has one, and its default."""
    for command, rows in settings.items():
        listed = []
        for row in rows:
            default = f"default {row['default']}" if row["default"] else ""
            listed.append((row["name"], row["meaning"].replace("`", ""), (row["flag"], default)))
        _show_listed(f"settings of {command}: --set KEY=VALUE", listed)


Listed = tuple[str, str, tuple[str, ...]]
"""A name, what it means, and what is to be said below that."""


def _described(row: Mapping[str, Any], *more: str) -> Listed:
    return row["name"], row["summary"], (row["paper"], *more)


def _measured(row: Mapping[str, Any]) -> str:
    return f"measured: {row['measured']}" if row["measured"] else UNMEASURED


def _show_listed(title: str, rows: Iterable[Listed]) -> None:
    """What each does, and below it the rest. (Two columns, since a terminal of 80 has no room for
    more.)"""
    grid = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    grid.add_column(no_wrap=True)
    grid.add_column()
    for name, summary, parts in rows:
        below = " · ".join(part for part in parts if part)
        grid.add_row(name, Text(summary).append(f"\n{below}" if below else "", "dim"))
    out.print(grid)


def _defaults(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_default(value)}" for name, value in parameters.items())


def _default(value: Any) -> str:
    """As a recipe spells it."""
    return value if isinstance(value, str) else json.dumps(value)
