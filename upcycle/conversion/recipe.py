"""Recipes: everything that a conversion's result depends on, besides the source."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
)

from upcycle.core.errors import UpcycleError
from upcycle.core.settings import (
    Choice,
    PlugIn,
    find_recipe,
    override,
    shipped_recipes,
    validated,
    yaml_fields,
)
from upcycle.models.runtimes import Runtime, runtimes_named

PLUG_INS = ("method", "split", "shared_by", "router", "fit", "compensate", "rest")
"""The fields that are a `Choice`."""
OF_METHOD = (
    *("experts", "top_k", "active", "shared", "split", "shared_by", "router"),
    *("fit", "compensate", "sequential", "keep_dense", "granularity", "spread_gain"),
    *("summary", "paper", "departures", "measured"),
)
"""What a recipe says of its method, which is void when one of another kind takes its place."""
LOSSY = ("active", "compensate", "sequential", "keep_dense")
"""What of it splits and pruned copies both follow."""
SHARED_EXPERTS = (
    "`shared_experts` counted parts of the FFN; now `shared` is the share of it that is always on "
    "and `experts` counts the routed experts alone: 2 of 16 are `experts=14` with `shared=0.125`"
)
SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)B?", re.IGNORECASE)


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


def _as_runtimes(value: Any) -> Any:
    """`llama.cpp`, `vllm,mlx` or a list."""
    value = () if value is None else value
    words = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(word, str) for word in words):
        raise ValueError("give runtimes such as llama.cpp,vllm")
    return runtimes_named(words)


def _as_bytes(value: Any) -> Any:
    """`5GB` as a number of bytes."""
    if not isinstance(value, str):
        return value
    match = SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("give a size such as 5GB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


class Recipe(BaseModel):
    """A conversion request. `None` means: chosen by the plan."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = "custom"
    summary: str = ""
    paper: str = ""
    departures: tuple[str, ...] = ()
    """Where the recipe can't or does not follow its paper."""
    measured: str | None = None
    """What it has cost on a real model."""

    method: PlugIn = Choice(name="split")
    """What becomes of each FFN: `split` | `prune` | `copy`, or a perturbation of copies, `drop` |
    `noise`; `merge` is what `upcycle merge` makes of several models."""
    experts: PositiveInt | None = None
    """Experts that the router chooses from: parts of each FFN, or copies of it, pruned or whole.
    By default about 24 to 64 parts, or 8 copies."""
    top_k: PositiveInt | None = None
    """Of these, active per token; of pruned copies 1. By default as `active` has it, or 2
    copies."""
    active: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of all layers' FFN neurons that a token uses, from which a split's top-k and shared
    neurons follow, or what a pruned copy keeps; layers kept dense count as 1. By default 0.5."""
    shared: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of each FFN's neurons that is always on, beside a split's experts: below 1. By default
    0.25 with top_k, else up to that, where the target has a shared expert."""
    granularity: PositiveInt = 1
    """Shards that each copy is cut into."""
    spread_gain: bool = False
    """Copies' weights stay as the router makes them, and what makes up for their size is spread
    over an expert's three matrices, as in arXiv:2410.07524: no longer the dense model's equal."""
    split: PlugIn = Choice(name="coactivation")
    """Which neurons share an expert: the name of a split."""
    shared_by: PlugIn = Choice(name="energy")
    """Which neurons are always on: the name of a shared-expert rule."""
    router: PlugIn | None = None
    """Who chooses the experts: the name of a router. By default ridge for a split, membership for
    pruned copies, normal for copies."""
    fit: PlugIn = Choice(name="none")
    """What a split's layers learn by gradient descent, one by one: the name of a fit."""
    compensate: PlugIn = Choice(name="none")
    """What makes up for inactive neurons: the name of a compensation."""
    rest: PlugIn = Choice(name="base")
    """What becomes of all but the FFNs where several models are merged: `base` | `mean` | `linear`
    | `ties` | `dare`."""
    sequential: bool = False
    """Each layer is fitted on what the layers already converted put out, not on the dense
    model's hidden states."""
    router_spread: Annotated[float, Field(ge=1e-4, le=1)] | None = None
    """Standard deviation of a token's logits over experts, to which the router is scaled: the
    smaller, the more alike the experts' weights; the larger, the less training upsets it. By
    default 0.1 with a refit, else 0.01."""
    keep_dense: Annotated[
        Literal["auto"] | tuple[NonNegativeInt, ...], BeforeValidator(_as_layers)
    ] = ()
    """Layers that stay dense: `0,1,29`, `none`, or `auto`: those that measurably hurt most, as
    many as pay under the active share."""
    target: str = "auto"
    """Architecture of the result; `auto` is the first that fits."""
    runtimes: Annotated[tuple[Runtime, ...], BeforeValidator(_as_runtimes)] = ()
    """Runtimes that are to run the result, beside transformers 5: `llama.cpp` | `vLLM` | `MLX` |
    `transformers-4`, in any case, several joined by commas. The target, the layers kept dense and
    `untied` are chosen so that all of them do."""
    untied: bool = False
    """Write the output embeddings as a tensor of their own where the source ties them to the
    input's."""
    allow_frozen_router: bool = False
    """Allow one copy per token where its router can't learn."""

    calibration: str = "mixed"
    """Text to fit on: `mixed` (builtin and self) | `builtin` | `self` | a file or folder of text |
    `hf:DATASET[@config][:split[:column]]` | `none`; several, joined by +, in equal parts."""
    calibration_tokens: PositiveInt = 32768
    """Tokens to fit on."""
    seq_len: PositiveInt = Field(default=512, ge=8)
    """Tokens per sequence."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Of the result: `auto` (the source's) | `float32` | `float16` | `bfloat16`."""
    device: str = "auto"
    """Where layers are fitted: `auto` | `cpu` | `cuda`."""
    max_shard_size: Annotated[PositiveInt, BeforeValidator(_as_bytes)] = 5 * 1000**3
    """Largest weight file, in bytes or as `5GB`."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Same seed, same bytes."""
    check: Literal["fast", "full", "none"] = "fast"
    """How much text to compare the result on: `fast` | `full` | `none`."""

    @property
    def router_name(self) -> str:
        """Empty where the plan chooses."""
        return "" if self.router is None else self.router.name

    def settings(self) -> dict[str, Any]:
        """All fields as plain values that make the same recipe again."""
        return self.model_dump(mode="json", exclude_defaults=False)


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
    override(fields, given, {name: Recipe.model_fields[name].default for name in PLUG_INS})
    if "shared_experts" in fields:
        raise UpcycleError(SHARED_EXPERTS)
    where = str(path) if path.suffix and str(recipe) == str(path) else "the request"
    return validated(Recipe, fields, where)


def _not_void(fields: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe's fields holds beside what is given: not what it says of its method, where
    one of another kind takes its place, and no top_k beside an active share.

    Raises:
        UpcycleError: both an active share and a top_k are given.
    """
    void: set[str] = set()
    was = _method_kind(fields.get("method"))
    becomes = _method_kind(given.get("method", fields.get("method")))
    if was != becomes:
        void = set(OF_METHOD) - set(() if "copies" in (was, becomes) else LOSSY)
    if given.get("active") is not None:
        if given.get("top_k") is not None:
            raise UpcycleError("`active` chooses `top_k`: give one of them")
        void.add("top_k")
    return {key: value for key, value in fields.items() if key not in void}


def _method_kind(method: Any) -> str:
    """`split`, `prune` or, of whole ones, perturbed or not, `copies`."""
    given = method.name if isinstance(method, Choice) else method or "split"
    name = given.get("name") if isinstance(given, Mapping) else given
    return name if name in ("split", "prune") else "copies"
