"""Settings: what a YAML file or a request says, as fields of a model."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import first_problem, parse_yaml
from upcycle.core.paths import local_path
from upcycle.core.registry import suggest

M = TypeVar("M", bound=BaseModel)


class Choice(BaseModel):
    """A plug-in by name, with its parameters."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def as_choice(value: Any) -> Any:
    if not isinstance(value, str | Mapping | Choice | None):
        raise ValueError("give a method's name, or a mapping of its name and parameters")
    return {"name": value} if isinstance(value, str) else value


PlugIn = Annotated[Choice, BeforeValidator(as_choice)]


def shipped_recipes() -> dict[str, Path]:
    """The recipes in the package, by name."""
    return yaml_files("recipes")


def shipped_presets() -> dict[str, Path]:
    """The presets of `upcycle finetune` in the package, by name."""
    return yaml_files("recipes/finetune")


def yaml_files(folder: str) -> dict[str, Path]:
    """The YAML files in a folder of the package, by name."""
    place = Path(str(resources.files("upcycle") / folder))
    return {path.stem: path for path in sorted(place.glob("*.yaml"))}


def recipe_text(recipe: str) -> str:
    """The YAML of a recipe or a preset."""
    path = find_recipe(recipe, shipped_recipes() | shipped_presets())
    yaml_fields(path)  # raises what it is not
    return path.read_text(encoding="utf-8")


def find_recipe(recipe: str | Path, shipped: Mapping[str, Path]) -> Path:
    """A shipped recipe's file, or the file itself."""
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    path = local_path(recipe)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise UpcycleError(f"recipe file {recipe} does not exist")
    raise UpcycleError(f"unknown recipe {str(recipe)!r}{suggest(str(recipe), shipped)}")


def yaml_fields(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, named after it if they have no name of their own."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UpcycleError(f"{path} is not YAML: it is not UTF-8 text") from error
    fields = parse_yaml(text, path) or {}
    if not isinstance(fields, dict):
        raise UpcycleError(f"{path} is not a mapping of settings to values")
    return {"name": path.stem} | fields


def validated(kind: type[M], fields: Mapping[str, Any], where: str) -> M:
    """The settings of one kind.

    Raises:
        UpcycleError: a field is unknown or out of range; `where` says whose it is.
    """
    for key in fields:
        if key not in kind.model_fields:
            raise UpcycleError(
                f"{where} has an unknown setting {key!r}{suggest(str(key), kind.model_fields)}"
            )
    try:
        return kind(**fields)
    except ValidationError as error:
        raise UpcycleError(f"{where}: {first_problem(error)}") from error
