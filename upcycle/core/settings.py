"""Settings: what a YAML file or a request says, as fields of a model."""

from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, NonNegativeFloat, ValidationError

from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
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


class Weighed(BaseModel):
    """A weight, and the parameters of what is weighed."""

    model_config = ConfigDict(frozen=True, extra="allow")

    weight: NonNegativeFloat

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def as_weighed(value: Any) -> Any:
    return value if isinstance(value, Mapping | Weighed) else {"weight": value}


WeighedPlugIns = Mapping[str, Annotated[Weighed, BeforeValidator(as_weighed)]]
"""Several of one kind, by name."""


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


def override(
    fields: dict[str, Any],
    given: Mapping[str, Any],
    plug_ins: Mapping[str, Choice | None],
    weighed: Collection[str] = (),
) -> None:
    """Replace settings, and parameters of plug-ins by dotted keys: `split.rows`, `gating.noise`,
    `router_losses.cv2`, `router_losses.erc.alpha`. A plug-in comes before its parameters, in
    whichever order they were given.

    Args:
        plug_ins: settings that are a `Choice`, and what they are where nothing is chosen.
        weighed: settings that are `WeighedPlugIns`.

    Raises:
        UpcycleError: a setting has no parameters, or its plug-in is not named.
    """
    for key, value in sorted(given.items(), key=lambda item: item[0].count(".")):
        name, dot, parameter = key.partition(".")
        if not dot:
            fields[name] = value
        elif name in plug_ins:
            fields[name] = _choice_of(fields, name, plug_ins[name], key) | {parameter: value}
        elif name in weighed:
            one, _, parameter = parameter.partition(".")
            table = dict(fields.get(name) or {})
            table[one] = as_weighed(table.get(one, {})) | {parameter or "weight": value}
            fields[name] = table
        else:
            known = [*plug_ins, *weighed]
            raise UpcycleError(f"`{key}`: {name!r} has no parameters{suggest(name, known)}")


def _choice_of(
    fields: Mapping[str, Any], name: str, default: Choice | None, key: str
) -> dict[str, Any]:
    chosen = as_choice(fields.get(name)) or default
    if isinstance(chosen, Choice):
        return chosen.model_dump()
    if not isinstance(chosen, Mapping):
        raise UpcycleError(
            f"`{key}`: name the {name} itself first, by {setting(name, 'NAME')} or in a recipe"
        )
    return dict(chosen)


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
