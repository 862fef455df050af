"""The front matter of model cards: what a source states of its origin and licence."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

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
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n")
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return {key: front[key] for key in STATED if isinstance(front, dict) and front.get(key)}


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
