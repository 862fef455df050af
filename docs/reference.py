"""docs/methods.md, cli.md, models.md and runtimes.md, from the registries, the recipes and the
options' help.

python docs/reference.py
"""

import inspect
from collections.abc import Iterable
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import typer
from transformers import CONFIG_MAPPING

from upcycle.cli import app
from upcycle.console.listing import every_method, every_setting
from upcycle.conversion.catalogue import UNMEASURED, describe_presets, describe_recipes
from upcycle.models.families import FAMILIES, describe
from upcycle.models.holders import HOLDERS
from upcycle.models.runtimes import RUNTIMES, Runtime
from upcycle.models.targets import TARGETS, MoETarget, unplaced
from upcycle.models.targets.base import Limit
from upcycle.models.targets.limits import unknown
from upcycle.models.unhosted import REASONS

DOCS = Path(__file__).parent
NOTE = "`python docs/reference.py` writes this page"
OF_KIND = {
    "split": "Which neurons share an expert: `--set split=NAME`",
    "shared-expert rule": "Which neurons are always on: `--set shared_by=NAME`",
    "router": "Who chooses the experts: `--set router=NAME`",
    "fit": "What layers learn by gradient descent, one by one: `--set fit=NAME`",
    "compensation": "What makes up for the others: `--set compensate=NAME`",
    "method": "What becomes of copies: `--method NAME`",
    "gate": "Who chooses among merged models: `--set router=NAME`",
    "router loss": "What routers are to do while they train: `--set router_losses.NAME=WEIGHT`",
    "gating": "Which experts tokens get while a model trains: `--set gating=NAME`",
    "rest rule": "What becomes of all but the FFNs in a merge: `--set rest=NAME`",
}
"""Titles; a kind that is not here goes by its own name."""

DENSE = {
    "granitemoehybrid": {"num_local_experts": 0},
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
}
"""Of classes whose defaults are those of a Mixture-of-Experts, what makes a dense model."""

DEFAULTS = {
    "convert": "Defaults are those of the recipe `default`; another may have its own.",
    "finetune": "A preset may have other defaults: `upcycle recipes heal` prints its own.",
}


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(escaped(cell) for cell in line)} |\n" for line in lines)


def escaped(cell: str) -> str:
    """A cell whose bars are no borders."""
    return cell.replace("|", "\\|")


def paper(reference: str) -> str:
    """A paper with a link, if it is on arXiv."""
    before, found, number = reference.rpartition("arXiv:")
    return f"{before}[{found}{number}](https://arxiv.org/abs/{number})" if found else reference


def methods_page() -> str:
    """Recipes, presets and every registered method."""
    recipes, presets = describe_recipes(), describe_presets()
    parts = [
        f"# Methods and recipes\n\n{NOTE} from what is registered, as `upcycle recipes` does.\n",
        "## Recipes of `convert`\n\n`upcycle convert MODEL --recipe NAME -o out`\n",
        table(
            ("recipe", "method", "what it does", "paper", "measured"),
            ((f"`{r['name']}`", r["method"], *about(r)) for r in recipes),
        ),
        "Where they depart from their papers:\n",
        "".join(departures(recipe) for recipe in recipes if recipe["departures"]),
        "## Presets of `finetune`\n\n`upcycle finetune MODEL --recipe NAME -o out`\n",
        table(
            ("preset", "what it does", "paper", "measured"),
            ((f"`{p['name']}`", *about(p)) for p in presets),
        ),
        "Where they depart from their papers:\n",
        "".join(departures(preset) for preset in presets if preset["departures"]),
    ]
    for kind, methods in groupby(every_method(), key=lambda method: str(method["kind"])):
        parts += [f"## {OF_KIND.get(kind, kind)}\n", methods_table(methods)]
    return "\n".join(parts)


def about(recipe: dict[str, Any]) -> tuple[str, str, str]:
    return recipe["summary"], paper(recipe["paper"]), recipe["measured"] or UNMEASURED


def departures(recipe: dict[str, Any]) -> str:
    points = "".join(f"  - {point}\n" for point in recipe["departures"])
    return f"- `{recipe['name']}`\n{points}"


def methods_table(methods: Iterable[dict[str, Any]]) -> str:
    return table(
        ("name", "what it does", "parameters", "reads text", "paper"),
        (
            (
                f"`{method['name']}`",
                method["summary"],
                ", ".join(f"`{name}={value}`" for name, value in method["parameters"].items()),
                reads(method),
                paper(method["paper"]),
            )
            for method in methods
        ),
    )


def reads(method: dict[str, Any]) -> str:
    """Whether a method reads text, and whether that takes a backward pass."""
    backwards = ", with a backward pass" if method["needs_gradients"] else ""
    return f"yes{backwards}" if method["needs_text"] else ""


def cli_page() -> str:
    """Every command with its options, as their help has them."""
    settings = every_setting()
    parts = [
        f"# The command line\n\n{NOTE} from the commands' help and the settings' meanings.\n",
        "A setting without a flag is set by `--set KEY=VALUE`, a method's parameter by "
        "`--set KEY.PARAMETER=VALUE`: `--set split=coactivation --set split.tokens=2048`. "
        "[Methods and their parameters](methods.md).\n",
    ]
    for name, command in typer.main.get_command(app).commands.items():
        parts += [f"## upcycle {name}\n", f"{command.help.strip()}\n"]
        context = typer.Context(command, info_name=name)
        found = [(panel(p), p.get_help_record(context)) for p in command.params]
        shown = [(title, record) for title, record in found if record is not None]
        for title in dict.fromkeys(title for title, _ in shown):
            rows = [(f"`{names}`", text) for of, (names, text) in shown if of == title]
            parts += [f"### {title} of {name}\n", table(("", "what it says"), rows)]
        if name in settings:
            parts += [
                f"### Every setting of {name}\n",
                f"{DEFAULTS[name]}\n",
                settings_table(settings[name]),
            ]
    return "\n".join(parts)


def settings_table(settings: Iterable[dict[str, str]]) -> str:
    return table(
        ("key", "default", "what it is", "flag"),
        (
            (f"`{row['name']}`", *(code(row["default"]), row["meaning"], code(row["flag"])))
            for row in settings
        ),
    )


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def panel(param: Any) -> str:
    """The heading that the help puts an argument or option under."""
    own: str | None = param.rich_help_panel
    return own or ("Arguments" if param.param_type_name == "argument" else "Options")


def models_page() -> str:
    """Every dense family with the targets that host it, and the families that none does."""
    parts = [
        f"# Models\n\n{NOTE} from the registered families.\n",
        "`upcycle inspect MODEL` says of a model which targets are in reach, and why others are "
        "not: its config.json decides. Here are those of a config.json with transformers' "
        "defaults.\n",
        table(
            ("model_type", "what it is", "targets"),
            ((f"`{name}`", what_it_is(name), hosts(name)) for name in sorted(FAMILIES)),
        ),
        "## With a vision tower\n",
        f"Qwen3.5 (`qwen3_5`) and Gemma 4 (`gemma4`), and models whose class takes any text model: "
        f"{', '.join(f'`{name}`' for name in sorted(HOLDERS))}. Their text model goes where the "
        "table says, all else keeps every bit, and plain transformers loads the whole as before "
        "(`AutoModelForImageTextToText`). Of others, give the text model alone.\n",
        "## Refused\n",
        "No native Mixture-of-Experts class computes what these do:\n",
        table(
            ("model_type", "why"),
            ((f"`{name}`", f"it {why}") for name, why in sorted(REASONS.items())),
        ),
    ]
    return "\n".join(parts)


def what_it_is(family: str) -> str:
    """The first sentence of the docstring of a family's file."""
    text = inspect.getdoc(import_module(f"upcycle.models.families.{family}")) or ""
    return text.split(".\n")[0].replace("\n", " ").rstrip(".")


def hosts(family: str) -> str:
    """The targets of a config with the defaults of its class, but for experts."""
    arch = describe(CONFIG_MAPPING[family](**DENSE.get(family, {})))
    names = [name for name, target in TARGETS.items() if not target.refusal(arch)]
    found = ", ".join(f"`{name}`" for name in sorted(names))
    return found or f"none with {' or '.join(unplaced(arch))}"


def runtimes_page() -> str:
    """Every target in every runtime: whether it was run there, and what it can't do there."""
    targets = sorted(TARGETS.items())
    parts = [
        f"# Targets in other runtimes\n\n{NOTE} from the targets' own files.\n",
        "Every target runs in transformers 5, where the tests run it. `plan` says of a model which "
        "other runtimes run the result, and why others do not; `--for` chooses what does "
        "([how](guides/serve.md)).\n",
        "## What was run\n",
        "The version and the day, where log-probabilities of results were compared with those of "
        "transformers 5 ([the numbers](../dev/log.md#in-other-runtimes)); *read*: known from the "
        "runtime's sources alone.\n",
        table(
            ("target", *RUNTIMES),
            ((f"`{name}`", *(seen(target, of) for of in RUNTIMES)) for name, target in targets),
        ),
        "## With what, and what is not possible\n",
        "A model beyond a limit is refused by the runtime, or computed otherwise without a word. "
        "Of encoders all these are: whatever the target, in these runtimes tokens see only those "
        "before them, as far as their sources were read.\n",
        table(
            ("target", "runtime", "run with", "limits"),
            (
                (
                    *(f"`{name}`", of, target.ran[of].what if of in target.ran else "*read*"),
                    " ".join(map(in_general, target.runtimes[of])) or "none known",
                )
                for name, target in targets
                for of in RUNTIMES
                if unknown not in target.runtimes[of]
            ),
        ),
        "Mixture-of-Experts models inside a model of several parts that takes any text model "
        "([which](models.md#with-a-vision-tower)) were run in transformers 5 alone; llama.cpp and "
        "MLX take none, as was read there, and vLLM should.\n",
    ]
    return "\n".join(parts)


def seen(target: MoETarget, runtime: Runtime) -> str:
    """Whether a target was run in a runtime."""
    if unknown in target.runtimes[runtime]:
        return "unknown there"
    run = target.ran.get(runtime)
    return f"{run.version}, {run.date}" if run else "*read*"


def in_general(limit: Limit) -> str:
    """A limit in words: its docstring, or its name."""
    return inspect.getdoc(limit) or f"{limit.__name__.replace('_', ' ').capitalize()}."


def main() -> None:
    (DOCS / "methods.md").write_text(methods_page(), "utf-8")
    (DOCS / "cli.md").write_text(cli_page(), "utf-8")
    (DOCS / "models.md").write_text(models_page(), "utf-8")
    (DOCS / "runtimes.md").write_text(runtimes_page(), "utf-8")


if __name__ == "__main__":
    main()
