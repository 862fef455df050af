"""The front matter of model cards: what a source states of its origin and licence."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import parse_yaml
from upcycle.core.paths import HUB_ID

STATED = ("base_model", "license", "license_name", "license_link", "language")
"""What a card hands on."""
GGUF_FIELDS = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
    "language": "general.languages",
}
ORIGINS = (
    r"general\.(url|repo_url)",
    r"general\.source\.(url|repo_url|huggingface\.repository)",
    r"general\.base_model\.\d+\.(url|repo_url)",
)
"""GGUF fields that name the model itself, what it was converted from, or what that comes from."""
HUB = "https://huggingface.co/"


def read_card(folder: Path) -> dict[str, Any]:
    """The fields that the front matter of a folder's README.md states, never guessed."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    front, _ = split_card(card.read_text(encoding="utf-8", errors="replace"))
    stated = {key: front[key] for key in STATED if front.get(key)}
    origins = stated.get("base_model", [])
    if not all(re.fullmatch(HUB_ID, str(name)) for name in _listed(origins)):
        del stated["base_model"]  # the path by which some trainer knew it
    return stated


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """The fields of a card's front matter, and the text below it; of one without, all of it."""
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}, text
    try:
        front = parse_yaml(parts[1], "a card")
    except UpcycleError:
        return {}, text
    return (front, parts[2]) if isinstance(front, dict) else ({}, text)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def with_results(
    front: dict[str, Any],
    name: str,
    results: Iterable[tuple[str, str, dict[str, float]]],
    task: str = "text-generation",
) -> dict[str, Any]:
    """The front matter with what was measured, as the hub shows it (model-index), in place of what
    it said before.

    Args:
        results: per text its identifier, its name for people, and metrics by their names.
        task: of those that the hub knows.
    """
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    rows = [
        EvalResult(task, text, called, metric, value)
        for text, called, metrics in results
        for metric, value in metrics.items()
    ]
    if not rows:
        return front
    return front | {"model-index": eval_results_to_model_index(name, rows)}


def write_gguf_card(fields: Mapping[str, Any], folder: Path) -> None:
    """A README.md in the folder that states what the metadata of a GGUF file does."""
    front = {key: fields[name] for key, name in GGUF_FIELDS.items() if name in fields}
    if origins := _origins(fields):
        front["base_model"] = origins
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n", encoding="utf-8")


def _origins(fields: Mapping[str, Any]) -> list[str]:
    """Hub ids of the nearest models that the metadata names."""
    for pattern in ORIGINS:
        places = {
            # The one field that holds no URL.
            (HUB if key.endswith("huggingface.repository") else "") + str(value)
            for key, value in fields.items()
            if re.fullmatch(pattern, key)
        }
        hubs = [re.fullmatch(rf"{HUB}([\w.-]+/[\w.-]+)/?", place) for place in sorted(places)]
        if found := [hub[1] for hub in hubs if hub]:
            return found
    return []
