"""Text: what the names of texts mean, and the documents that they hold.

A text is a file, a hub dataset, or one of those that need neither:

- `builtin`: prose of many kinds, chats and source code that ship with upcycle (`corpus/docs`), and
  modules of Python's standard library;
- `self`: what the model writes itself (`writer.py`);
- `mixed`: both, or the first alone where the model can't write;
- `probe:KIND`: more of each kind of `builtin`, on which nothing is ever fitted (`corpus/probes`);
  `probes` are all of them.
"""

import json
import random
import sysconfig
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.foreign import blaming, parse_json
from upcycle.paths import local_path, public_name

Document = str | list[dict[str, Any]]
"""Text, or the messages of a chat."""
SUFFIXES = (".txt", ".raw", ".md", ".jsonl", ".parquet")
CORPUS = Path(str(resources.files("upcycle") / "corpus"))
KINDS = ("encyclopedia", "web", "news", "fiction", "scholarly", "technical", "code", "chat")
"""Of builtin text, in the order in which they are shown."""
PARTING = "\n%\n"
"""Between documents of one file, as fortune files have it."""
PROBES = tuple(f"probe:{kind}" for kind in KINDS)
OURS = ("builtin", "probes", *PROBES)
"""Texts that ship with upcycle."""
NAMES = {
    "--calibration": ("mixed", "builtin", "self", "none"),
    "--data": ("builtin",),
    "--text": ("probes", "builtin"),
}
"""Of texts that are no files, by what they are for."""
MODULE_MOST = 4000
"""Characters of one module of the standard library; all of them are about as much as our code."""
MODULES = """
    argparse bisect calendar collections/__init__ configparser contextlib copy csv dataclasses
    datetime difflib enum fractions heapq html/parser http/client ipaddress json/decoder
    logging/__init__ pathlib queue random sched shutil statistics string textwrap zipfile
""".split()


def texts(text: str) -> list[str]:
    """The texts that are joined by +, unless a file has that name."""
    if "+" not in text or local_path(text).is_file():
        return [text]
    return text.split("+")


def public_texts(text: str) -> str:
    """The texts that are joined by +, files by their names alone."""
    return "+".join(map(public_name, texts(text)))


def check_text(text: str, flag: str = "--calibration") -> None:
    """Raise the errors about a text that can be known without reading it.

    `mixed`, `self` and `none` are calibration texts only; on probes models are only measured.
    """
    names = NAMES[flag]
    if text in names or (flag == "--text" and text in PROBES):
        return
    if text.startswith("hf:"):
        if not text.removeprefix("hf:").split(":")[0]:
            raise UpcycleError(f"{flag} {text!r} names no dataset: hf:DATASET")
        return
    path = local_path(text)
    if not path.is_file():
        raise UpcycleError(
            f"{flag} {text!r} is not a file: give {', '.join(names)}, "
            "hf:DATASET[:split[:column]] or a .txt, .jsonl or .parquet file"
        )
    if path.suffix not in SUFFIXES:
        raise UpcycleError(
            f"{flag} {text!r} ends in {path.suffix!r}: known are {', '.join(SUFFIXES)}"
        )


def documents(text: str, seed: int) -> Iterator[Document]:
    """The documents of a text, one after the other.

    Args:
        seed: of the order of builtin text.

    Raises:
        UpcycleError: the text can't be read.
    """
    if text == "builtin":
        return builtin(seed)
    if text in PROBES:
        return iter(shipped("probes", text.removeprefix("probe:")))
    if text == "probes":
        return _mixed([shipped("probes", kind) for kind in KINDS])
    if text.startswith("hf:"):
        return _hub_dataset(text.removeprefix("hf:"))
    path = local_path(text)
    if path.suffix == ".jsonl":
        return _jsonl(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    return iter([_read_text(path)])


def builtin(seed: int) -> Iterator[Document]:
    """All kinds, in an order of the seed."""
    shuffle = random.Random(seed).shuffle
    kinds = [*(shipped("docs", kind) for kind in KINDS), _standard_library()]
    for found in kinds:
        shuffle(found)
    return _mixed(kinds)


def _mixed(kinds: list[list[Document]]) -> Iterator[Document]:
    """Evenly: each kind begins, and ends, where the others do."""
    placed = [
        ((i + 0.5) / len(found), number, text)
        for number, found in enumerate(kinds)
        for i, text in enumerate(found)
    ]
    return (text for *_, text in sorted(placed, key=lambda place: place[:2]))


def shipped(folder: str, kind: str) -> list[Document]:
    """The documents of one kind in a folder of the corpus: `docs` or `probes`."""
    if kind == "chat":
        lines = (CORPUS / folder / "chat.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["messages"] for line in lines]
    text = (CORPUS / folder / f"{kind}.txt").read_text(encoding="utf-8")
    return [document.strip("\n") for document in text.split(PARTING)]


def paragraphs(folder: str) -> dict[str, list[str]]:
    """By language (ISO 639-1), the same paragraphs in each."""
    lines = (CORPUS / folder / "languages.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, list[str]] = {}
    for row in map(json.loads, lines):
        found.setdefault(row["language"], []).append(row["text"])
    return found


def openers(kind: str) -> list[str]:
    """How documents of a kind may begin; of chats, the first question."""
    lines = (CORPUS / "openers" / f"{kind}.txt").read_text(encoding="utf-8").splitlines()
    return [line.replace("\\n", "\n") if kind == "code" else line for line in lines if line]


def _standard_library() -> list[Document]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [folder / f"{name}.py" for name in MODULES]
    modules = (path.read_text(encoding="utf-8") for path in paths if path.is_file())
    return [module[:MODULE_MOST] for module in modules]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows begins a file with a mark
    except UnicodeDecodeError as error:
        raise UpcycleError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


def _jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number},")
        row = row if isinstance(row, dict) else {}
        if isinstance(row.get("text"), str):
            yield row["text"]
        elif _is_chat(row.get("messages")):
            yield row["messages"]
        else:
            raise UpcycleError(
                f'{path}, line {number}, has neither a "text" string nor a "messages" list'
            )


def _is_chat(messages: Any) -> bool:
    """A template would render anything else as nothing."""
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(isinstance(message, dict) for message in messages)
    )


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UpcycleError(f"{path} needs `pip install upcycle[datasets]`") from error
    with blaming(f"{path} is not a parquet file"):
        file = pyarrow.parquet.ParquetFile(path)
    if "text" not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise UpcycleError(f'{path} has no column "text" (it has {names})')
    kind = file.schema_arrow.field("text").type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UpcycleError(f'{path}: column "text" holds {kind}, not strings')
    with blaming(f"{path} is damaged, or holds text that is not UTF-8"):
        for batch in file.iter_batches(columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text)


def _hub_dataset(name: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise UpcycleError(f"hf:{name} needs `pip install upcycle[datasets]`") from error
    dataset, split, column = [*name.split(":"), "", ""][:3]
    split, column = split or "train", column or "text"
    with blaming(f"hf:{dataset} can't be loaded"):
        for row in datasets.load_dataset(dataset, split=split, streaming=True):
            if column not in row:
                raise UpcycleError(
                    f"hf:{dataset} has no column {column!r} (it has {', '.join(row)})"
                )
            if not isinstance(row[column], str):
                kind = type(row[column]).__name__
                raise UpcycleError(f"hf:{dataset}: column {column!r} holds {kind}, not strings")
            yield row[column]
