"""How a command ends: one sentence instead of a traceback, and its exit code.

Without torch or transformers, and without rich: every command begins here.
"""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from upcycle.core.errors import AlreadyFinished, CheckFailed, UpcycleError
from upcycle.core.flags import as_flags
from upcycle.core.json_text import json_text


@contextmanager
def ending(
    interrupted: str = "interrupted; nothing was left behind, unless --resume was given to go on "
    "later",
    *,
    as_json: bool = False,
) -> Iterator[None]:
    """One sentence instead of a traceback: exit code 2 for bad input and too little
    memory, 1 for anything else.

    Args:
        interrupted: what is said of an interrupt.
        as_json: whether the result is printed as JSON, an earlier one's too.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except AlreadyFinished as finished:
        _show_finished(finished, as_json=as_json)
    except UpcycleError as error:
        _fail(as_flags(str(error)), 2)
    except CheckFailed as error:
        _fail(f"{error}; please report this", 1)
    except KeyboardInterrupt:
        _fail(interrupted, 1)
    except OSError as error:
        where = f": {str(error.filename)[:200]}" if error.filename else ""
        _fail(f"{error.strerror or error}{where}", 2 if error.errno in BAD_NAME else 1)
    except (MemoryError, RuntimeError) as error:
        from upcycle.core.foreign import OUT_OF_MEMORY, out_of_memory

        if not out_of_memory(error):
            raise
        _fail(as_flags(OUT_OF_MEMORY), 2)


BAD_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
"""What the system says of a path that nobody could have meant."""


def _show_finished(finished: AlreadyFinished, *, as_json: bool) -> None:
    """Of a result that an earlier run has left: what upcycle.json says of its last run, or a
    sentence."""
    if not first_process():
        return
    if not as_json:
        sys.stdout.write(f"{finished}\n")
        return
    from upcycle.models.record.file import RECORD, read_record

    record = read_record(finished.out / RECORD)
    print_json((record.training[-1] if record.training else record).plain())


def _fail(sentence: str, code: int) -> NoReturn:
    if first_process():
        sys.stderr.write(f"error: {sentence}\n")
    raise typer.Exit(code)


def print_json(value: Any) -> None:
    """A line of JSON on stdout, for machines."""
    sys.stdout.write(json_text(value) + "\n")


def first_process() -> bool:
    """Of several that train together, only one process speaks."""
    return os.environ.get("RANK", "0") == "0"
