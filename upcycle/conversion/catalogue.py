"""What there is to choose from: recipes, presets of training, methods and targets.

Without torch, which methods need when they run: what is to be known of them beforehand lies in
catalogue.json, which `make catalogue` writes from the registries.
"""

import json
from functools import cache
from importlib import resources
from typing import Any

from upcycle.conversion.recipe import Recipe, load_recipe
from upcycle.core.errors import UpcycleError
from upcycle.core.registry import check_parameters, suggest
from upcycle.core.settings import Choice, shipped_presets, shipped_recipes, yaml_fields

CATALOGUE = "catalogue.json"
UNMEASURED = "not measured on a real model"
"""What is said of a recipe or a preset that does not say what it cost or brought."""
KINDS = {
    "method": "method",
    "split": "split",
    "shared_by": "shared-expert rule",
    "router": "router",
    "fit": "fit",
    "compensate": "compensation",
    "rest": "rest rule",
}
"""The fields of a recipe that name a method, and what the methods are called there."""


def methods() -> list[dict[str, Any]]:
    """Every method: kind, name, summary, paper, parameters with their defaults, and whether with
    these it needs text, and a backward pass."""
    listed: list[dict[str, Any]] = _catalogue()["methods"]
    return listed


@cache
def _catalogue() -> dict[str, Any]:
    text = (resources.files("upcycle.conversion") / CATALOGUE).read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def check_names(recipe: Recipe) -> None:
    """Raise if the recipe names a method, a parameter of one or a target that there is not.

    Raises:
        UpcycleError: the sentence names those that there are.
    """
    for field, kind in KINDS.items():
        choice = getattr(recipe, field)
        if field == "router" and choice is not None and recipe.method.name == "merge":
            _check_choice(("router", "gate"), choice)
        elif choice is not None and not (field == "method" and choice.name in _plain_ways()):
            _check_choice((kind,), choice)
    targets = _catalogue()["targets"]
    if recipe.target not in ("auto", *targets):
        raise UpcycleError(f"unknown target {recipe.target!r}{suggest(recipe.target, targets)}")


def _plain_ways() -> set[str]:
    """Ways of making experts that are no perturbation of copies, and take no parameters."""
    perturbed = {method["name"] for method in methods() if method["kind"] == "method"}
    return set(_catalogue()["ways"]) - perturbed


def _check_choice(kinds: tuple[str, ...], choice: Choice) -> None:
    """Of methods of these kinds, called what the first of them is."""
    kind = kinds[0]
    known = {row["name"]: row["parameters"] for row in methods() if row["kind"] in kinds}
    if choice.name not in known:
        names = [*known, *(_plain_ways() if kind == "method" else ())]
        raise UpcycleError(f"unknown {kind} {choice.name!r}{suggest(choice.name, names)}")
    check_parameters(f"{kind} {choice.name!r}", choice.params, known[choice.name])


def describe_recipes() -> list[dict[str, Any]]:
    """The shipped recipes: name, paper, what they do and cost."""
    recipes = [load_recipe(name) for name in shipped_recipes()]
    return [
        {
            "name": recipe.name,
            "method": recipe.method.name,
            "summary": recipe.summary,
            "paper": recipe.paper,
            "departures": list(recipe.departures),
            "measured": recipe.measured,
        }
        for recipe in recipes
    ]


def describe_presets() -> list[dict[str, Any]]:
    """The presets of `upcycle finetune`: name, paper, what they do and bring."""
    listed = [yaml_fields(path) for path in shipped_presets().values()]
    return [
        {name: fields[name] for name in ("name", "summary", "paper")}
        | {"departures": list(fields.get("departures", ())), "measured": fields.get("measured")}
        for fields in listed
    ]
