"""What people see: progress bars and tables, through rich. No logic."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from upcycle.conversion import Progress as OnProgress
    from upcycle.evaluate import Evaluation
    from upcycle.planning import Plan
    from upcycle.report import Conversion

out = Console()
err = Console(stderr=True)


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


def table(title: str, rows: Mapping[str, Any], *headings: str) -> None:
    """Rows of a name and one or more values."""
    grid = Table(title=title, title_justify="left", show_header=bool(headings), title_style="bold")
    grid.add_column("")
    for heading in headings or ("",):
        grid.add_column(heading, justify="right" if headings else "left", overflow="fold")
    for name, values in rows.items():
        cells = values if isinstance(values, tuple) else (values,)
        grid.add_row(name, *(str(cell) for cell in cells))
    out.print(grid)


def size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return (
        f"{num_bytes:.0f} {unit}" if num_bytes >= 100 or unit == "B" else f"{num_bytes:.1f} {unit}"
    )


def count(number: int) -> str:
    for scale, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= scale:
            return f"{number / scale:.4g} {letter}"
    return str(number)


def show_plan(plan: "Plan") -> None:
    """What would be built, and what each target says."""
    recipe = plan.recipe
    table(
        f"{plan.source.label} → {plan.target}",
        {
            "method": _method(plan),
            "experts": _experts(plan) + _chosen(plan),
            "layers": _layers(plan),
            "active FFN": f"{100 * plan.active_ffn_ratio:.0f} % of the dense model's",
            "parameters": f"{count(plan.params_total)} (dense {count(plan.params_dense)})",
            "active per token": count(plan.params_active),
            "combine": "unweighted sum" if plan.combine == "sum" else "weighted mean",
            "output": f"{size(plan.bytes)} in {str(plan.dtype).removeprefix('torch.')}",
            "calibration": f"{plan.fit_tokens:,} tokens of {recipe.calibration}"
            if plan.streams
            else "not needed",
            "memory": f"about {size(plan.peak_bytes())}"
            + (f", the check {size(plan.check_bytes())}" if recipe.check != "none" else ""),
        },
    )
    table("targets", {name: why or "ok" for name, why in plan.targets.items()})
    show_warnings(plan)


def show_warnings(plan: "Plan") -> None:
    for warning in plan.warnings:
        err.print(f"[yellow]note[/]: {warning}", highlight=False)


def _method(plan: "Plan") -> str:
    recipe = plan.recipe
    router = recipe.router.name if recipe.router else ""
    if recipe.copies:
        return f"{recipe.method.name}, router {router}"
    shared = f", shared by {recipe.shared_by.name}" if plan.geometry.shared_experts else ""
    refit = f", compensation {recipe.compensate.name}" if plan.compensates else ""
    order = ", layer by layer" if plan.sequential else ""
    return f"split by {recipe.split.name}{shared}, router {router}{refit}{order}"


def _experts(plan: "Plan") -> str:
    geometry, expert_size = plan.geometry, plan.spec.expert_size
    shared = f"{geometry.shared_experts} shared + " if geometry.shared_experts else ""
    return (
        f"{shared}{geometry.top_k} of {geometry.routed_experts} routed, {expert_size} neurons each"
    )


def _chosen(plan: "Plan") -> str:
    if plan.request.experts is not None or plan.recipe.copies:
        return ""
    number = plan.geometry.num_experts
    return f" (--experts {number} by default: more lose less, fewer are faster)"


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
            "perplexity": (f"{check.perplexity_dense:.2f}", f"{check.perplexity_moe:.2f}"),
            "… ratio": ("1", f"{check.perplexity_ratio:.3f}"),
            "KL to dense, nats": ("0", f"{check.kl:.4f}"),
            "same next token": ("100 %", f"{100 * check.top1_agreement:.1f} %"),
            "exactness": ("", _exactness(conversion)),
            "expert load": ("", f"{min(loads):.2f} to {max(loads):.2f} × fair share"),
            "dead experts": ("", f"{check.dead_experts} of {len(loads)}"),
        }
    rows |= {
        "time": ("", ", ".join(f"{name} {s:.0f} s" for name, s in conversion.seconds.items())),
        "peak memory": ("", size(conversion.peak_bytes)),
    }
    title = f"{plan.source.label} → {plan.target}: {_method(plan)}; {_experts(plan)}"
    table(title, rows, "dense", "MoE")
    if check is not None:
        out.print(
            f"Measured on {check.tokens:,} held-back tokens of {plan.recipe.calibration}, "
            f"windows of {check.window}.",
            highlight=False,
        )
        out.print(_verdict(conversion), highlight=False)
    else:
        out.print("Not checked (--check none).", highlight=False)
    out.print(
        f"[bold]{conversion.out}[/] loads with AutoModelForCausalLM.from_pretrained",
        highlight=False,
    )


def _exactness(conversion: "Conversion") -> str:
    check = conversion.check
    if check is None or check.exact_error is None:
        return "not expected: copies were changed"
    what = "copies" if conversion.plan.recipe.copies else "all experts on"
    beside = ", refit down_proj in both" if conversion.plan.compensates else ""
    return f"ok, {what}{beside}: logits differ by {check.exact_error:.1g} σ"


def _verdict(conversion: "Conversion") -> str:
    plan, check = conversion.plan, conversion.check
    if check is None:
        return ""
    ratio = check.perplexity_ratio
    if plan.recipe.method.name == "copy":
        return "The function is unchanged; train it further so that the copies come to differ."
    if plan.recipe.copies:
        return f"Perplexity is {ratio:.2f} × the dense model's until the new neurons are trained."
    first = "" if 0 in plan.spec.dense_layers else ", keep layers dense (--keep-dense auto)"
    if ratio <= 1.1:
        return f"The split costs {100 * (ratio - 1):.1f} % of perplexity."
    return (
        f"[bold yellow]The split costs much: perplexity is {ratio:.2f} × the dense model's.[/] "
        f"To lose less, raise --active, cut finer with more --experts{first}; "
        "or train the result further."
    )


def show_evaluation(model: str, report: "Evaluation") -> None:
    """Perplexity, and the distance from the dense model if there is one."""
    rows = {"perplexity": f"{report.perplexity:.3f}"}
    if report.perplexity_ratio is not None:
        rows |= {
            "dense perplexity": f"{report.perplexity_against:.3f}",
            "ratio": f"{report.perplexity_ratio:.4f}",
            "KL to dense, nats": f"{report.kl:.4f}",
            "same next token": f"{100 * (report.top1_agreement or 0):.1f} %",
        }
    loads = [share for layer in report.load for share in layer]
    if loads:
        rows["expert load"] = f"{min(loads):.2f} to {max(loads):.2f} × fair share"
        rows["dead experts"] = f"{loads.count(0)} of {len(loads)}"
    rows["text"] = f"{report.tokens:,} tokens in windows of {report.window}"
    table(model, rows)


def show_inspection(report: Mapping[str, Any]) -> None:
    """A model's facts, then what each target says of it."""
    hidden = {"model", "targets", "traits", "check", "experts_possible"}
    rows = {name.replace("_", " "): _fact(v) for name, v in report.items() if name not in hidden}
    rows |= {f"has {trait}": why for trait, why in report.get("traits", {}).items()}
    if "experts_possible" in report:
        rows["--experts that fit"] = ", ".join(map(str, report["experts_possible"]))
    if report.get("check"):
        rows["perplexity over dense"] = f"{report['check']['perplexity_ratio']:.3f}"
    table(str(report["model"]), rows)
    if "targets" in report:
        table("targets", report["targets"])


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 10**6:
        return f"{value:,}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def show_recipes(recipes: list[dict[str, Any]], methods: list[dict[str, Any]]) -> None:
    """The shipped recipes, then the methods that any recipe can name."""
    grid = Table("recipe", "method", "what it does", "paper", title="recipes", title_justify="left")
    for recipe in recipes:
        grid.add_row(recipe["name"], recipe["method"], recipe["summary"], recipe["paper"])
    out.print(grid)
    grid = Table(
        "kind", "name", "what it does", "parameters", "paper", title="methods", title_justify="left"
    )
    for method in methods:
        parameters = ", ".join(f"{k}={v}" for k, v in method["parameters"].items())
        grid.add_row(method["kind"], method["name"], method["summary"], parameters, method["paper"])
    out.print(grid)
