"""What other programs wrote: read within bounds, and refused in one sentence.

Libraries raise anything on a file that is not what it should be. `blaming` goes around a call of
theirs on such a file, never around code of ours, whose bugs must show.
"""

import errno
import json
import reprlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting

DEEPEST = 64
"""Lists and mappings in one another. Deeper ones bring down programs that follow them."""
LONGEST = 300
"""Characters of a library's own words in a sentence of ours."""
NO_MEMORY = ("not enough memory", "allocate memory", "out of memory", "bad_alloc")
"""What a RuntimeError says that is a lack of memory; torch has no other on a CPU."""
NO_ROOM = ("No space left", "os error 28")
OUT_OF_MEMORY = (
    f"out of memory: lower `seq_len` or {setting('micro_batch')}; to convert, lower "
    "`calibration_tokens` or pass `check=none`; to train, give "
    f"{setting('gradient_checkpointing', True)} or `lora=8`"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python's or of torch's is a lack of memory."""
    said = isinstance(error, RuntimeError) and any(word in str(error) for word in NO_MEMORY)
    return said or isinstance(error, MemoryError)


def reason(error: BaseException) -> str:
    """The first line of what an error says; and the second, where the first is only its heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KeyError) or not lines:
        lines = [" ".join([type(error).__name__, *lines])]
    first = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return first if len(first) <= LONGEST else f"{first[:LONGEST]} …"


def blamed(error: BaseException, what: str) -> UpcycleError:
    """A library's error as a sentence about a file, unless memory or the disk is to blame."""
    if isinstance(error, UpcycleError):
        return error
    if out_of_memory(error):
        return UpcycleError(f"{OUT_OF_MEMORY} ({what})")
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if full or any(words in str(error) for words in NO_ROOM):
        return UpcycleError(
            f"no room is left on the disk, perhaps of the folder for temporary files, "
            f"{tempfile.gettempdir()}: make room, or name another folder by TMPDIR"
        )
    return UpcycleError(f"{what}: {reason(error)}")


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Whatever a library raises inside becomes an UpcycleError that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise blamed(error, what) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # how a library in Rust fails
            raise
        raise blamed(error, what) from error


def parse_json(text: str, where: Path | str, expected: str = "JSON") -> Any:
    """A value from JSON.

    Raises:
        UpcycleError: it is none, or too deep; `where` is not `expected`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "" if expected == "JSON" else "it is not JSON: "
        raise UpcycleError(f"{where} is not {expected}: {kind}{reason(error)}") from error
    if _too_deep(value):
        raise UpcycleError(f"{where} is not {expected}: it is nested more than {DEEPEST} deep")
    return value


def read_json(path: Path, expected: str = "JSON") -> Any:
    """A file's value.

    Raises:
        UpcycleError: as `parse_json` and `read_text`.
    """
    return parse_json(read_text(path, expected), path, expected)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        UpcycleError: it holds none.
    """
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise UpcycleError(f"{path} is not a JSON object")
    return fields


def read_text(path: Path, expected: str) -> str:
    """A file's text.

    Raises:
        UpcycleError: it is not UTF-8, so it is not `expected`.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UpcycleError(f"{path} is not {expected}: it is not UTF-8 text") from error


def parse_yaml(text: str, where: Path | str) -> Any:
    """A value from YAML without aliases, a few of which make a value of any size.

    Raises:
        UpcycleError: it is not YAML, has aliases, says something twice or is too deep.
    """
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UpcycleError(f"{where} is not YAML: {' '.join(said.split())[:LONGEST]}") from error
    if _too_deep(value):
        raise UpcycleError(f"{where} is nested more than {DEEPEST} deep")
    return value


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"write values out in place of aliases{mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in keys[:place]:
                raise yaml.YAMLError(f"{key.value} is given twice{key.start_mark}")
        return super().construct_mapping(node, deep)


def _too_deep(value: Any) -> bool:
    level, depth = [value], 0
    while level and depth < DEEPEST:
        parts = [v.values() if isinstance(v, dict) else v for v in level if _holds(v)]
        level, depth = [inner for part in parts for inner in part if _holds(inner)], depth + 1
    return bool(level)


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list | tuple | set)


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints, on one line, without a value that may be pages long."""
    problem = error.errors()[0]
    # Which of several kinds a value was taken for, <kind>, is no field.
    field = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("<"))
    if problem["type"] == "missing":
        return f"{field} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    value = _short.repr(problem["input"])
    value = value if len(value) <= 120 else f"{value[:60]} … {value[-40:]}"
    return f"{field}={value}: {message[0].lower()}{message[1:]}"


_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 3, 100, 80
