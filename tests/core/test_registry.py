"""Registries: nothing is forgotten, everything is described, a miss is helpful."""

import ast
import json
import re
import statistics
from pathlib import Path

import pytest

import upcycle
from upcycle.conversion.catalogue import CATALOGUE, check_names
from upcycle.conversion.compensate import COMPENSATIONS
from upcycle.conversion.fit import FITS
from upcycle.conversion.inspection import registered
from upcycle.conversion.recipe import load_recipe
from upcycle.conversion.rest import RESTS
from upcycle.core.errors import UpcycleError
from upcycle.core.registry import Registry, suggest
from upcycle.core.settings import shipped_recipes
from upcycle.finetune import catalogue as of_training
from upcycle.finetune.gating import GATINGS
from upcycle.finetune.plugins import registered as registered_for_training
from upcycle.finetune.router_losses import ROUTER_LOSSES
from upcycle.models.families import FAMILIES
from upcycle.models.targets import TARGETS
from upcycle.router_init import ROUTERS
from upcycle.router_init.gates import GATES
from upcycle.split import SPLITS
from upcycle.split.copies import PERTURBS
from upcycle.split.shared import SHARED

PACKAGE = Path(upcycle.__file__).parent
FOLDERS = {
    "split": SPLITS,
    "split/shared": SHARED,
    "router_init": ROUTERS,
    "router_init/gates": GATES,
    "conversion/fit": FITS,
    "conversion/compensate": COMPENSATIONS,
    "conversion/rest": RESTS,
    "split/copies": PERTURBS,
    "finetune/router_losses": ROUTER_LOSSES,
    "finetune/gating": GATINGS,
    "models/families": FAMILIES,
    "models/targets": TARGETS,
}
METHODS = [
    pytest.param(method, id=f"{folder}-{method.name}")
    for folder, registry in FOLDERS.items()
    if folder not in ("models/families", "models/targets")
    for method in registry.values()
]
NO_PLUG_INS = {
    "conversion/fit": {"__init__", "base", "loop", "learn"},
    "models/targets": {"__init__", "base", "limits"},
    "conversion/rest": {"__init__", "registry"},
}
"""Files of these folders that register nothing; elsewhere `__init__` and `base`."""
MAX_LINES = 65
MAX_LINES_OF_MOST = 25
"""Of nine functions in ten."""


def plug_ins(folder):
    names = {path.stem for path in (PACKAGE / folder).glob("*.py")}
    return sorted(names - NO_PLUG_INS.get(folder, {"__init__", "base"}))


def imported_by(folder):
    tree = ast.parse((PACKAGE / folder / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    return {alias.name for node in imports for alias in node.names}


def functions():
    """Every function of the package with its number of lines."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(PACKAGE)}:{node.name}", node.end_lineno - node.lineno + 1


def test_catalogue_holds_what_is_registered():
    assert json.loads((PACKAGE / "conversion" / CATALOGUE).read_text()) == registered(), (
        "run `make catalogue`"
    )
    assert of_training.methods() == json.loads(json.dumps(registered_for_training())), (
        "run `make catalogue`"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "cut"},
        {"split": "rendom"},
        {"shared_by": "x"},
        {"router": "rigde"},
        {"fit": "transpart"},
        {"compensate": "x"},
        {"target": "mixtrel"},
        {"split": {"name": "random", "tokens": 4}},
        {"method": {"name": "drop", "rato": 0.5}},
    ],
)
def test_catalogue_refuses_what_the_registries_refuse_in_the_same_words(dense, settings):
    with pytest.raises(UpcycleError) as planned:
        upcycle.plan(str(dense()), **settings)
    with pytest.raises(UpcycleError) as told:
        check_names(load_recipe("default", settings))
    assert str(told.value) == str(planned.value)


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_catalogue_knows_the_names_in_the_shipped_recipes(recipe):
    check_names(load_recipe(recipe))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_of_a_plug_in_folder_is_registered(folder):
    assert len(plug_ins(folder)) > 1
    for name in plug_ins(folder):
        module = f"upcycle.{folder.replace('/', '.')}.{name}"
        assert module in imported_by(folder), f"{folder}/__init__.py lacks: import {module}"
        assert name in FOLDERS[folder], f"{folder}/{name}.py registers nothing called {name}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_registered_name_has_its_file(folder):
    assert sorted(FOLDERS[folder]) == plug_ins(folder)


@pytest.mark.parametrize("folder", FOLDERS)
def test_entries_carry_the_name_they_are_registered_by(folder):
    assert all(entry.name == name for name, entry in FOLDERS[folder].items())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_summary_and_a_paper(method):
    assert len(method.summary) > 10
    assert "\n" not in method.summary
    assert re.search(r"arXiv:\d{4}\.\d{5}|^ours$|^baseline$|^mergekit-moe$", method.paper)


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_has_a_default(method):
    assert method.params().model_fields_set == set()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_miss_suggests_the_nearest_name_and_lists_all(folder):
    registry = FOLDERS[folder]
    for name in registry:
        with pytest.raises(UpcycleError) as error:
            registry[f"{name}x"]
        message = str(error.value)
        assert f"unknown {registry.kind} '{name}x', did you mean '{name}'?" in message
        assert all(known in message for known in registry)


def test_a_miss_with_nothing_near_lists_all():
    assert suggest("zzz", ["ridge", "normal"]) == "; known: normal, ridge"


def test_a_name_is_registered_once():
    registry = Registry("thing")
    registry.add("one", 1)
    with pytest.raises(ValueError, match="thing 'one' is registered twice"):
        registry.add("one", 2)
    assert dict(registry) == {"one": 1}


def test_a_registry_is_a_mapping_in_order_of_registration():
    registry = Registry("thing")
    for place, name in enumerate("cab"):
        registry.add(name, place)
    assert list(registry) == ["c", "a", "b"]
    assert len(registry) == 3
    assert "a" in registry
    assert "d" not in registry


def test_no_function_is_long():
    lengths = dict(functions())
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= MAX_LINES_OF_MOST
