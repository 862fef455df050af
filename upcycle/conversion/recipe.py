"""Recipes: everything that a conversion's result depends on, besides the source."""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import first_problem, parse_yaml
from upcycle.core.paths import local_path
from upcycle.core.registry import suggest

PLUG_INS = ("method", "split", "shared_by", "router", "compensate")
"""The fields that are a `Choice`."""
SPLIT_ONLY = (
    *("experts", "top_k", "active", "shared", "split", "shared_by", "router"),
    *("compensate", "sequential", "keep_dense"),
    *("summary", "paper", "departures"),
)
"""What a recipe says of a split, which is void when another method takes its place."""
LOSSY = ("active", "compensate", "sequential", "keep_dense")
"""What of it pruned copies follow, too."""
SHARED_EXPERTS = (
    "--shared-experts counted parts of the FFN; now --shared is the share of it that is always on "
    "and --experts counts the routed experts alone: --experts 16 --shared-experts 2 is "
    "--experts 14 --shared 0.125"
)
M = TypeVar("M", bound=BaseModel)
SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)B?", re.IGNORECASE)


class Choice(BaseModel):
    """A plug-in by name, with its parameters."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _as_choice(value: Any) -> Any:
    if not isinstance(value, str | Mapping | Choice | None):
        raise ValueError("give a method's name, or a mapping of its name and parameters")
    return {"name": value} if isinstance(value, str) else value


def _as_layers(value: Any) -> Any:
    """`auto`, `none`, `0,1,29`, a number or a list."""
    if value == "auto":
        return value
    if value in ("none", "", None):
        return ()
    parts = value.split(",") if isinstance(value, str) else value
    parts = parts if isinstance(parts, list | tuple) else [parts]
    if not all(str(part).strip().isdecimal() for part in parts):
        raise ValueError("give layers such as 0,1,29, auto or none")
    return tuple(sorted({int(part) for part in parts}))


def _as_bytes(value: Any) -> Any:
    """`5GB` as a number of bytes."""
    if not isinstance(value, str):
        return value
    match = SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("give a size such as 5GB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


PlugIn = Annotated[Choice, BeforeValidator(_as_choice)]


class Recipe(BaseModel):
    """A conversion request. `None` means: chosen by the plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "custom"
    summary: str = ""
    paper: str = ""
    departures: tuple[str, ...] = ()
    """Where the recipe can't or does not follow its paper."""

    method: PlugIn = Choice(name="split")
    """`split`, `prune`, `copy`, or a perturbation of copies: `drop`, `noise`."""
    experts: PositiveInt | None = None
    """Routed experts that a split cuts the FFN into, or copies of the FFN."""
    top_k: PositiveInt | None = None
    active: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Active share of all layers' FFNs, from which a split's top_k is chosen, or what a pruned copy
    keeps."""
    shared: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the FFN's neurons that a split keeps always on."""
    granularity: PositiveInt = 1
    """Shards that each copy is cut into."""
    spread_gain: bool = False
    """Copies' weights stay as the router makes them, and what makes up for their size is spread
    over an expert's three matrices, as in arXiv:2410.07524: no longer the dense model's equal."""
    split: PlugIn = Choice(name="coactivation")
    shared_by: PlugIn = Choice(name="energy")
    router: PlugIn | None = None
    compensate: PlugIn = Choice(name="none")
    """How the active neurons make up for the others."""
    sequential: bool = False
    """Each layer is fitted on what the layers already converted put out, not on the dense
    model's hidden states."""
    router_spread: Annotated[float, Field(ge=1e-4, le=1)] | None = None
    """Standard deviation of a token's logits over experts, to which the router is scaled: the
    smaller, the more alike the experts' weights; the larger, the less training upsets it."""
    keep_dense: Annotated[
        Literal["auto"] | tuple[NonNegativeInt, ...], BeforeValidator(_as_layers)
    ] = ()
    """`auto`: those that would hurt most, as many as pay under the active share."""
    target: str = "auto"
    allow_frozen_router: bool = False

    calibration: str = "mixed"
    calibration_tokens: PositiveInt = 32768
    seq_len: PositiveInt = Field(default=512, ge=8)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"
    max_shard_size: Annotated[PositiveInt, BeforeValidator(_as_bytes)] = 5 * 1000**3
    seed: int = Field(default=0, ge=0, lt=2**63)
    check: Literal["fast", "full", "none"] = "fast"

    def settings(self) -> dict[str, Any]:
        """All fields as plain values that make the same recipe again."""
        return self.model_dump(mode="json", exclude_defaults=False)


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


def load_recipe(
    recipe: str | Path = "default", overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """A shipped recipe or a YAML file, with some of its fields replaced.

    Args:
        recipe: a name from `upcycle recipes` or the path of a .yaml file.
        overrides: fields to replace; a dotted key such as `split.rows` sets a method's parameter.

    Raises:
        UpcycleError: no such recipe, or a field that is unknown or out of range.
    """
    path = find_recipe(recipe, shipped_recipes())
    given = dict(overrides or {})
    fields = _not_void(yaml_fields(path), given)
    # A method first, then its parameters, in whichever order they were given.
    for key, value in sorted(given.items(), key=lambda item: "." in item[0]):
        _override(fields, key, value)
    where = str(path) if path.suffix and str(recipe) == str(path) else "the request"
    return validated(Recipe, fields, where)


def _not_void(fields: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe's fields holds beside what is given: not what it says of a split, where
    another method takes its place, and no top_k beside an active share.

    Raises:
        UpcycleError: both an active share and a top_k are given.
    """
    void: set[str] = set()
    method = _method_name(given.get("method"))
    if _method_name(fields.get("method")) == "split" != method:
        void = set(SPLIT_ONLY) - set(LOSSY if method == "prune" else ())
    if given.get("active") is not None:
        if given.get("top_k") is not None:
            raise UpcycleError("--active chooses --top-k: give one of them")
        void.add("top_k")
    return {key: value for key, value in fields.items() if key not in void}


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


def _method_name(method: Any) -> Any:
    if isinstance(method, Choice):
        return method.name
    return method.get("name") if isinstance(method, Mapping) else method or "split"


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


def _override(fields: dict[str, Any], key: str, value: Any) -> None:
    name, dot, parameter = key.partition(".")
    if not dot:
        fields[key] = value
        return
    if name not in PLUG_INS:
        raise UpcycleError(f"--set {key}: {name!r} has no parameters{suggest(name, PLUG_INS)}")
    default = Recipe.model_fields[name].default
    current = _as_choice(fields.get(name)) or (default.model_dump() if default else None)
    if not isinstance(current, dict):
        raise UpcycleError(f"--set {key}: name the {name} itself first, by --{name} or in a recipe")
    fields[name] = current | {parameter: value}


def validated(kind: type[M], fields: Mapping[str, Any], where: str) -> M:
    """The settings of one kind.

    Raises:
        UpcycleError: a field is unknown or out of range; `where` says whose it is.
    """
    for key in fields:
        if key == "shared_experts":
            raise UpcycleError(SHARED_EXPERTS)
        if key not in kind.model_fields:
            raise UpcycleError(
                f"{where} has an unknown setting {key!r}{suggest(str(key), kind.model_fields)}"
            )
    try:
        return kind(**fields)
    except ValidationError as error:
        raise UpcycleError(f"{where}: {first_problem(error)}") from error
