"""What is printed, and where: tables and notes, through rich."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from upcycle.core.flags import as_flags
from upcycle.models.text import kind_name

LONGEST_WORD = 14
"""Letters of a heading that are never cut."""
COLOURS = {"fine": "bold green", "heal": "bold yellow", "broken": "bold red"}
out = Console(emoji=False)  # :name: may be part of a file's name
err = Console(stderr=True, emoji=False)


def table(title: str, rows: Mapping[str, Any], *headings: str) -> None:
    """Rows of a name and one or more values, which are no markup: files have any names."""
    grid = Table(
        title=Text(title), title_justify="left", show_header=bool(headings), title_style="bold"
    )
    grid.add_column("", overflow="fold")
    for heading in headings or ("",):
        # A narrow terminal must not cut a word; a file's name may be longer than it has room for.
        one_word = " " not in heading and 0 < len(heading) <= LONGEST_WORD
        grid.add_column(
            heading, justify="right" if headings else "left", overflow="fold", no_wrap=one_word
        )
    for name, values in rows.items():
        cells = values if isinstance(values, tuple) else (values,)
        texts = (c if isinstance(c, Text) else Text(as_flags(str(c))) for c in (name, *cells))
        grid.add_row(*texts)
    out.print(grid)


def show_notes(notes: Iterable[str]) -> None:
    for note in notes:
        err.print(f"[yellow]note[/]: {escape(as_flags(note))}", highlight=False)


def told_apart(texts: Iterable[str]) -> list[str]:
    """What people read of texts; of files that have the same name, where they lie."""
    given = list(texts)
    names = [kind_name(text) for text in given]
    return [
        text if names.count(name) > 1 else name for text, name in zip(given, names, strict=True)
    ]


def show_push(url: str, *, quiet: bool) -> None:
    """Where the result is; beside a JSON object, not on stdout."""
    (err if quiet else out).print(f"Pushed to {url}", highlight=False, markup=False)
