"""What travels with a checkpoint's weights as it is: tokenizer, licence and the like."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from upcycle.core.errors import UpcycleError
from upcycle.models.download import LEGAL
from upcycle.models.sentences import sentence_files

PLACES = (
    *("name_or_path", "_name_or_path", "tokenizer_file", "special_tokens_map_file"),
    *("vocab_file", "merges_file"),
)
"""Fields of tokenizer_config.json in which some versions leave paths of their machine."""


def companions(folder: Path) -> Iterator[Path]:
    """Files that travel with a checkpoint as they are: tokenizer, generation config, licence, and
    what sentence-transformers puts behind an encoder.

    Raises:
        UpcycleError: as `own_file` and `sentence_files`.
    """
    patterns = (
        "tokenizer*", "*.model", "*.tiktoken", "vocab.*", "merges.txt", "special_tokens_map.json",
        "added_tokens.json", "chat_template*", "additional_chat_templates/*.jinja",
        "generation_config.json", "*processor_config.json", *LEGAL,
    )  # fmt: skip
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    found = {path for path in (*found, *sentence_files(folder)) if path.is_file()}
    yield from (own_file(path, folder) for path in sorted(found))


def own_file(path: Path, folder: Path) -> Path:
    """The path of a file below a checkpoint's folder that may go into a result. What is a link may
    lead to a file that nobody meant to publish.

    Raises:
        UpcycleError: it leads out of the folder (or, in the hub's cache, out of the blobs of the
            same repository).
    """
    home, target = folder.resolve(), path.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise UpcycleError(
            f"{path} is a link out of its folder, to {target}, which would be published with the "
            "result: put a copy in its place, or delete the link"
        )
    return path


def check_own_files(folder: Path) -> None:
    """Raise before the work what would keep a checkpoint's files from going along.

    Raises:
        UpcycleError: one is a link out of the folder.
    """
    for path in (folder / "config.json", folder / "README.md", *companions(folder)):
        own_file(path, folder)


def copy_companions(folder: Path, place: Path) -> None:
    for path in companions(folder):
        copy = place / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    _drop_places(place / "tokenizer_config.json")


def _drop_places(path: Path) -> None:
    """A tokenizer's settings are published, so they name no place on the machine of their author.
    Nobody reads these fields."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # there is none, or transformers says what is wrong with it
    if not isinstance(fields, dict):
        return
    found = [key for key in PLACES if Path(str(fields.get(key))).is_absolute()]
    if found:
        kept = {key: value for key, value in fields.items() if key not in found}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
