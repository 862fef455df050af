"""Text: what the names of texts mean, and the documents that they hold.

A text is a file, a data set in a folder or on the hub, or one of those that need neither:

- `builtin`: prose of many kinds, chats and source code that ship with upcycle (`corpus/docs`), and
  modules of Python's standard library;
- `self`: what the model writes itself (`writer.py`);
- `mixed`: both, or the first alone where the model can't write;
- `probe:KIND`: more of each kind of `builtin`, on which nothing is ever fitted (`corpus/probes`);
  `probes` are all of them.
"""

import json
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from pathlib import Path

from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.paths import local_path, public_name
from upcycle.models.reading import COMPRESSED, ENDINGS, PLAIN, ending, read_dataset, read_file
from upcycle.models.rows import Document, Exchange

CORPUS = Path(str(resources.files("upcycle.models") / "corpus"))
KINDS = ("encyclopedia", "web", "news", "fiction", "scholarly", "technical", "code", "chat")
"""Of builtin text, in the order in which they are shown."""
PARTING = "\n%\n"
"""Between documents of one file, as fortune files have it."""
PROBES = tuple(f"probe:{kind}" for kind in KINDS)
OURS = ("builtin", "probes", *PROBES)
"""Texts that ship with upcycle."""
HUB = "hf:DATASET[@config][:split[:column]]"
NAMES = {
    "calibration": ("mixed", "builtin", "self", "none"),
    "data": ("builtin",),
    "text": ("probes", "builtin"),
    "validate_also": ("probes", "builtin"),
}
"""Of texts that are no files, by what they are for."""
DATA = {*ENDINGS} - {*PLAIN} | {".arrow", ".tar", ".zip", ".zst"}
"""What files of a data set end in that are more than text."""
PART = re.compile(r"(?<![a-z])(train|test|val|valid|validation|dev|eval)(?![a-z])")
"""Of a data set, in a file's name."""
MODULE_MOST = 4000
"""Characters of one module of the standard library; all of them are about as much as our code."""
MODULES = """
    argparse bisect calendar collections/__init__ configparser contextlib copy csv dataclasses
    datetime difflib enum fractions heapq html/parser http/client ipaddress json/decoder
    logging/__init__ pathlib queue random sched shutil statistics string textwrap zipfile
""".split()


@dataclass(frozen=True)
class Shipped:
    """What ships with upcycle: `builtin`, `probes`, or one of the latter."""

    name: str
    local = False
    """Whether it lies here and is as long as it is, so that windows are taken from all of it."""

    @property
    def files(self) -> list[Path]:
        """What the text is read from here, besides upcycle itself."""
        return []

    def documents(self, seed: int) -> Iterator[Document]:
        if self.name == "builtin":
            return builtin(seed)
        if self.name == "probes":
            return _mixed([shipped("probes", kind) for kind in KINDS])
        return iter(shipped("probes", self.name.removeprefix("probe:")))


@dataclass(frozen=True)
class File:
    """A file of text, or of rows."""

    path: Path
    local = True

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def documents(self, seed: int) -> Iterator[Document]:
        return read_file(self.path)


@dataclass(frozen=True)
class Folder:
    """A folder of plain text, each file of which is a document. (`datasets` would make one of every
    line, and read but one kind of file.)"""

    path: Path
    local = True

    @property
    def files(self) -> list[Path]:
        return _plain_files(self.path)

    def documents(self, seed: int) -> Iterator[Document]:
        return (document for path in self.files for document in read_file(path))


@dataclass(frozen=True)
class DataSet:
    """A data set on the hub, or a folder of one. What is empty is left to `datasets`."""

    label: str
    """How errors name it."""
    path: str
    config: str = ""
    split: str = ""
    column: str = ""

    @property
    def local(self) -> bool:
        return Path(self.path).is_dir()

    @property
    def files(self) -> list[Path]:
        found = Path(self.path).rglob("*") if self.local else ()
        return sorted(path for path in found if path.is_file())

    def documents(self, seed: int) -> Iterator[Document]:
        return read_dataset(
            self.label, self.path, config=self.config, split=self.split, column=self.column
        )


Text = Shipped | File | Folder | DataSet
"""A text that has documents; what the model writes has none that could be read again."""


def texts(text: str) -> list[str]:
    """The names of texts that are joined by +, unless a file or folder has that name."""
    if "+" not in text or local_path(text).exists():
        return [text]
    return text.split("+")


def weighted(text: str) -> list[tuple[str, Fraction]]:
    """The texts that are joined by +, and how much each counts: of `a.txt*2+b.txt` the first one
    twice as much."""
    return list(map(_weighted, texts(text)))


def _weighted(name: str) -> tuple[str, Fraction]:
    found = re.fullmatch(r"(.+)\*(\d+(?:\.\d+)?)", name)
    if found is None or local_path(name).exists():
        return name, Fraction(1)
    return found[1], Fraction(found[2])


def public_texts(text: str) -> str:
    """The texts that are joined by +, files by their names alone."""
    return "+".join(
        public_name(name) + ("" if weight == 1 else f"*{float(weight):g}")
        for name, weight in weighted(text)
    )


def parse(text: str, field: str = "text") -> Text:
    """The text that a name means.

    Raises:
        UpcycleError: it means none.
    """
    if text in OURS:
        return Shipped(text)
    if text.startswith("hf:"):
        return _data_set(text, field)
    path = local_path(text)
    if path.name and path.is_dir():  # what is here, or everything, is no text
        return Folder(path) if _plain_files(path) else DataSet(text, str(path))
    if not path.is_file():
        raise UpcycleError(
            f"`{field}={text!r}` is not a file: give {', '.join(NAMES[field])}, {HUB}, or a file "
            f"or folder of text ({', '.join(ENDINGS)})"
        )
    if ending(path) not in ENDINGS:
        raise UpcycleError(
            f"`{field}={text!r}` ends in {ending(path)!r}: known are {', '.join(ENDINGS)}, also "
            f"followed by {', '.join(COMPRESSED)}"
        )
    return File(path)


def _plain_files(folder: Path) -> list[Path]:
    """The files of a folder of plain text, in order, of parts of a data set (`wiki.train.raw`)
    those to train on; none where rows or archives lie there, too, or nothing but a card."""
    every = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = [path for path in every if not _is_hidden(path.relative_to(folder))]
    plain = [path for path in found if ending(path) in PLAIN]
    if any(ending(path) in DATA for path in found) or {p.name for p in plain} <= {"README.md"}:
        return []
    parts = {path: PART.findall(path.name.lower()) for path in plain}
    if any("train" in part for part in parts.values()):
        return [path for path, part in parts.items() if "train" in part or not part]
    return plain


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _data_set(text: str, field: str) -> DataSet:
    name, split, column = [*text.removeprefix("hf:").split(":"), "", ""][:3]
    path, _, config = name.partition("@")
    if local_path(name).is_dir():
        path, config = name, ""
    if not path:
        raise UpcycleError(f"`{field}={text!r}` names no dataset: {HUB}")
    folder = local_path(path)
    return DataSet(f"hf:{name}", str(folder) if folder.is_dir() else path, config, split, column)


def check_text(text: str, field: str = "calibration") -> None:
    """Raise the errors about a text that can be known without reading it.

    `mixed`, `self` and `none` are calibration texts only; on probes models are only measured.
    """
    if text in NAMES[field]:
        return
    if "probes" not in NAMES[field] and text in ("probes", *PROBES):
        measured = setting("validate_also") if field == "data" else "`text`"
        raise UpcycleError(
            f"`{field}={text!r}` is for {measured} alone: nothing is ever fitted on probes"
        )
    parse(text, field)


def text_files(text: str) -> list[Path]:
    """The files here that texts, joined by +, are read from."""
    named = (name for name, _ in weighted(text) if name not in NAMES["calibration"])
    return [path for name in named for path in parse(name).files]


def documents(text: str, seed: int) -> Iterator[Document]:
    """The documents of a text, one after the other.

    Args:
        seed: of the order of builtin text.

    Raises:
        UpcycleError: the text can't be read.
    """
    return parse(text).documents(seed)


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
        return [Exchange(json.loads(line)["messages"]) for line in lines]
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


def kind_name(text: str) -> str:
    """What people read of a text that a row of the check is about."""
    named = {"self": "its own writing"}
    if text.startswith("probe:"):
        return f"{text.removeprefix('probe:')}, built in"
    return named.get(text, public_name(text))
