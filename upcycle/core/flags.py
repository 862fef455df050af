"""How a sentence names a setting: in Python as the field that it is, on the command line by its
flag, or by `--set` if it has none.

The flags of `convert` and `finetune` are listed here alone.
"""

import re
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel

CONVERSION_FLAGS = (
    *("method", "keep_dense", "target", "runtimes"),
    *("active", "experts", "top_k", "shared"),
    *("calibration", "calibration_tokens", "seq_len"),
    *("check", "dtype", "device", "seed"),
)
"""Fields of a recipe that `convert` and `plan` have a flag for; `--set` sets the others."""
MERGE_FLAGS = (
    *("rest", "router", "target", "top_k"),
    *("seq_len", "check", "dtype", "device", "seed"),
)
"""Fields of a recipe that `merge` has a flag for; `--set` sets the others."""
TRAINING_FLAGS = (
    *("train", "lora", "merge", "lr"),
    *("data", "assistant_only_loss", "tokens", "steps", "seq_len", "batch_size"),
    *("teacher", "distill", "balance"),
    *("precision", "device", "seed"),
)
"""Fields of a training request that `finetune` has a flag for; `--set` sets the others."""
PARAMETERS = (
    *("out", "overwrite", "resume", "revision", "recipe"),
    *("text", "base", "shared_model", "add", "prompts"),
    *("against", "tasks", "speed", "card", "evaluation", "push_to_hub", "private"),
)
"""Flags that are no setting of a recipe or a preset."""
SPELLED = {"runtimes": "--for", "prompts": "--prompt", "out": "-o"}
"""Flags that are not called as their field is."""
ABOUT = ("name", "summary", "paper", "departures", "measured")
"""Fields that say what a recipe is, and change nothing."""


def setting(field: str, value: Any = None) -> str:
    """A setting as sentences name it, in backticks: `top_k=2`.

    Args:
        value: left out where it is not known: `top_k`, and `granularity=…`, which has no flag.
    """
    if value is None:
        return f"`{field}`" if has_flag(field) else f"`{field}=…`"
    return f"`{field}={value if isinstance(value, bool) else spelled(value)}`"


def as_flags(sentence: str) -> str:
    """A sentence that names settings, as the command line spells them: `top_k=2` becomes
    --top-k 2, and `granularity=2` --set granularity=2."""
    return re.sub(r"`([a-z_]+)((?:\.\w+)*)(?:=([^`]*))?`", _as_flag, sentence)


def _as_flag(found: re.Match[str]) -> str:
    field, parameter, value = found.groups()
    if parameter or not has_flag(field):
        told = {"True": "true", "False": "false"}.get(value, value)
        return found[0] if value is None else f"--set {field}{parameter}={told}"
    return flag_of(field) if value in (None, "True") else f"{flag_of(field)} {value}"


def has_flag(field: str) -> bool:
    return field in {*CONVERSION_FLAGS, *MERGE_FLAGS, *TRAINING_FLAGS, *PARAMETERS}


def flag_of(field: str) -> str:
    """The flag of a field that has one: `--top-k`."""
    return SPELLED.get(field, "--" + field.replace("_", "-"))


def spelled(value: Any) -> str:
    """A value as people type it: true, 0.5, 0,1,29, a method by its name."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(spelled, value)) or "none"
    if isinstance(value, BaseModel):
        return spelled(value.name)  # type: ignore[attr-defined]
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_settings(defaults: BaseModel, flags: Collection[str]) -> list[dict[str, str]]:
    """Every setting of a recipe or a training request: its name, its meaning, its default as
    people type it and its flag, each empty where there is none.

    Args:
        defaults: a request in which nothing was asked for.
    """
    return [
        {
            "name": name,
            "meaning": " ".join((field.description or "").split()),
            "default": "" if getattr(defaults, name) is None else spelled(getattr(defaults, name)),
            "flag": flag_of(name) if name in flags else "",
        }
        for name, field in type(defaults).model_fields.items()
        if name not in ABOUT
    ]
