"""Reading: the documents of files and data sets, one after the other.

Of a file or data set no more is held than what is being read: it may be larger than memory.
"""

import bz2
import csv
import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import blaming, parse_json
from upcycle.models.rows import FIELDS, FORMS, Document, Part, row_document, unread, value_document

PIECE = 2**20  # characters that are read at once
LONGEST_WORD = 512  # characters at whose end a piece is cut at white space
TABLE_ROWS = 256  # that are read at once
COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PLAIN = (".txt", ".raw", ".md")
SEPARATORS = re.compile(r"[\s,\[\]]*")
"""Between the objects of a JSON array, of which nothing else is of interest."""


def ending(path: Path) -> str:
    """What the form of a file is known by: the suffix before that of its compression, if any."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def read_file(path: Path) -> Iterator[Document]:
    """The documents of a file whose ending is one of `ENDINGS`; a file of plain text is one.

    Raises:
        UpcycleError: it can't be read, or a row is in none of the forms.
    """
    return READERS[ending(path)](path)


def read_dataset(
    label: str, path: str, *, config: str, split: str, column: str
) -> Iterator[Document]:
    """The documents of a data set on the hub or in a folder.

    Args:
        label: how to name it in errors.
        config, split, column: if empty, the only one, `train` and every form of row.

    Raises:
        UpcycleError: it can't be had, or a row is in none of the forms.
    """
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise UpcycleError(f"{label} needs `pip install upcycle[datasets]`") from error
    for number, row in enumerate(_dataset_rows(label, path, config, split), 1):
        if not column:
            document = row_document(row, f"{label}, row {number}")
        elif column in row:
            document = value_document(row[column], f"{label}: column {column!r}")
        else:
            raise UpcycleError(f"{label} has no column {column!r} (it has {', '.join(row)})")
        if document is not None:
            yield document


def _dataset_rows(label: str, path: str, config: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        yield from _open_dataset(path, config, split)
    except Exception as error:  # of as many kinds as there are libraries below
        raise UpcycleError(f"{label} can't be loaded: {_reason(error)}") from error


def _open_dataset(path: str, config: str, split: str) -> Iterable[dict[str, Any]]:
    import datasets

    folder = Path(path)
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if not saved:
        found: Iterable[dict[str, Any]] = datasets.load_dataset(
            path, name=config or None, split=split or "train", streaming=True
        )
        return found
    loaded = datasets.load_from_disk(path)
    whole = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    wanted = split or ("train" if isinstance(loaded, dict) else next(iter(whole)))
    if wanted not in whole:
        raise ValueError(f"it has no split {wanted!r} (it has {', '.join(whole)})")
    only: Iterable[dict[str, Any]] = whole[wanted]
    return only


def _reason(error: Exception) -> str:
    """What `datasets` says, less its examples of Python; its second line has the configurations."""
    lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
    if not lines[0].startswith("Config name is missing"):
        return lines[0]
    return " ".join([*lines[:2], "as hf:DATASET@CONFIG"])


# --- files -----------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path, **settings: Any) -> Iterator[TextIO]:
    """A file as text, whatever it is compressed with."""
    opener = COMPRESSED.get(path.suffix.lower(), open)
    try:
        # Windows begins a file with a mark.
        with opener(path, "rt", encoding="utf-8-sig", **settings) as file:
            yield file
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UpcycleError(
            f"{path} is not UTF-8 text ({error.reason}: 0x{byte:02x} after "
            f"{error.object[max(0, error.start - 20) : error.start]!r})"
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UpcycleError(f"{path} can't be read: {error}") from error


def _plain(path: Path) -> Iterator[Document]:
    """One document, in parts if it is long."""
    with _opened(path) as file:
        text, parts = "", 0
        while more := file.read(PIECE):
            if text:
                cut = _cut(text)
                yield Part(text[:cut])
                text, parts = text[cut:], parts + 1
            text += more
        if parts or text.strip():
            yield text


def _cut(text: str) -> int:
    """Where a part ends: after its last word."""
    begin = max(1, len(text) - LONGEST_WORD)
    spaces = [match.start() for match in re.compile(r"(?<=\S)\s").finditer(text, begin)]
    return spaces[-1] if spaces else len(text)


def _json_lines(path: Path) -> Iterator[Document]:
    # Other line ends than these may be inside a string.
    with _opened(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            document = row_document(parse_json(line, f"{where},"), where)
            if document is not None:
                yield document


def _json(path: Path) -> Iterator[Document]:
    """The objects of an array, or that follow each other."""
    with _opened(path) as file:
        for number, row in enumerate(_json_values(path, file), 1):
            document = row_document(row, f"{path}, row {number}")
            if document is not None:
                yield document


def _json_values(path: Path, file: TextIO) -> Iterator[Any]:
    decoder, text, place = json.JSONDecoder(), "", 0
    while True:
        try:
            place = SEPARATORS.match(text, place).end()  # type: ignore[union-attr]
            row, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            rest = text[place:]
            more = file.read(max(PIECE, len(rest)))
            if more:
                text, place = rest + more, 0
            elif rest:
                raise UpcycleError(f"{path} is not JSON: {error}") from error
            else:
                return
        else:
            yield row


def _table(path: Path) -> Iterator[Document]:
    """Comma- or tab-separated values under a line of names."""
    csv.field_size_limit(sys.maxsize)  # a text may be long
    with _opened(path, newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if ending(path) == ".tsv" else ",")
        try:
            for row in rows:
                document = row_document(row, f"{path}, line {rows.line_num}")
                if document is not None:
                    yield document
        except csv.Error as error:
            raise UpcycleError(f"{path}, line {rows.line_num}: {error}") from error


def _parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UpcycleError(f"{path} needs `pip install upcycle[datasets]`") from error
    with blaming(f"{path} is not a parquet file"):
        # Else all groups of rows that have been read stay in memory.
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=PIECE)
    with file:
        names = file.schema_arrow.names
        if not any({*form} <= {*names} for form in FORMS):
            raise UpcycleError(f"{path} {unread(names)}")
        for number, row in enumerate(_parquet_rows(path, file, sorted(FIELDS & {*names})), 1):
            document = row_document(row, f"{path}, row {number}")
            if document is not None:
                yield document


def _parquet_rows(path: Path, file: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Without the other columns, which may be large."""
    with blaming(f"{path} is damaged, or holds text that is not UTF-8"):
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(TABLE_ROWS, row_groups=[group], columns=columns):
                yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    **dict.fromkeys(PLAIN, _plain),
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}
ENDINGS = tuple(READERS)
