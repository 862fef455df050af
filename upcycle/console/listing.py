"""Facts of a model, and what there is to choose from."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from upcycle.console.output import out, table
from upcycle.conversion import catalogue as of_conversion
from upcycle.conversion.catalogue import UNMEASURED
from upcycle.conversion.recipe import load_recipe
from upcycle.core.flags import CONVERSION_FLAGS, TRAINING_FLAGS, describe_settings
from upcycle.finetune import catalogue as of_training
from upcycle.finetune.settings import Training


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


def every_method() -> list[dict[str, Any]]:
    """Every plug-in of `convert`, `merge` and `finetune`."""
    return [*of_conversion.methods(), *of_training.methods()]


def every_setting() -> dict[str, list[dict[str, str]]]:
    """What `--set` sets, by command. A recipe or a preset may have other defaults."""
    return {
        "convert": describe_settings(load_recipe(), CONVERSION_FLAGS),
        "finetune": describe_settings(Training(), TRAINING_FLAGS),
    }
