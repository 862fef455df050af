"""Rows: what a row of a data set says, whichever file or hub it comes from.

The forms are those that trl reads, ShareGPT's and Alpaca's. A row that says nothing is no document.
"""

from collections.abc import Callable
from typing import Any

from upcycle.core.errors import UpcycleError

Message = dict[str, Any]
"""A turn of a chat, as templates know it: `role` and `content`, perhaps `tool_calls`."""


class Part(str):
    """A part of a text that goes on in the next document, which begins with white space."""


class Exchange(list[Message]):
    """Messages for which plain text can stand, where a model has no form for chats."""


Document = str | list[Message]
"""Text, or the messages of a chat."""
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""ShareGPT's, where templates have other names."""


class _OtherForm(Exception):
    """What a field should be; its value is something else."""


def row_document(row: Any, where: str) -> Document | None:
    """What a row says; None where that is nothing.

    Args:
        where: the row's place, for the error.

    Raises:
        UpcycleError: the row has none of the forms, or a field of one is of another type.
    """
    if row is None:
        return None
    if not isinstance(row, dict):
        raise UpcycleError(f"{where}, is {_kind(row)}, not an object with fields")
    known = not row
    for fields, read in FORMS.items():
        if not all(field in row for field in fields):
            continue
        known = True
        try:
            document = read(row)
        except _OtherForm as error:
            held = ", ".join(f'"{field}" holds {_kind(row[field])}' for field in fields)
            raise UpcycleError(f"{where}: {held}, not {error}") from None
        if document is not None:
            return document
    if not known:
        raise UpcycleError(f"{where}, {unread(list(row))}")
    return None


def unread(fields: list[str]) -> str:
    """Of fields that make none of the forms."""
    forms = [" with ".join(f'"{field}"' for field in form) for form in FORMS]
    return f"has none of {', '.join(forms)} (it has {', '.join(map(str, fields))})"


def value_document(value: Any, where: str) -> Document | None:
    """What one field says that was asked for by its name.

    Raises:
        UpcycleError: it is neither text nor a chat.
    """
    try:
        return _words(value) if value is None or isinstance(value, str) else _chat(value)
    except _OtherForm:
        raise UpcycleError(f"{where} holds {_kind(value)}, not strings") from None


def _words(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise _OtherForm("a string")
    return value if value.strip() else None


def _chat(value: Any) -> list[Message] | None:
    """Messages, under whichever names; what says nothing in them is left out."""
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        # Older data sets hold a list of turns as columns.
        turns = zip(*value.values(), strict=False)
        value = [dict(zip(value, turn, strict=True)) for turn in turns]
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise _OtherForm("a list of messages")
    messages = [_message(turn) for turn in value]
    return messages if any(map(_says, messages)) else None


def _message(turn: Message) -> Message:
    """Columns of a table are there in every row, even where a message lacks the field."""
    turn = {field: value for field, value in turn.items() if value is not None}
    if "role" not in turn and "from" in turn:
        role = turn.pop("from")
        turn = {"role": ROLES.get(role, role), "content": turn.pop("value", "")} | turn
    return turn


def _says(message: Message) -> bool:
    content = message.get("content")
    said = content.strip() if isinstance(content, str) else content
    return bool(said or message.get("tool_calls"))


def _completed(row: Message) -> Document | None:
    """A prompt and what follows it at once, as trl joins them."""
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        messages = [*(_chat(prompt) or []), *(_chat(completion) or [])]
        return messages or None
    return _words((_words(prompt) or "") + (_words(completion) or ""))


def _instructed(row: Message) -> Document | None:
    asked = [_words(row["instruction"]), _words(row.get("input"))]
    turns = {"user": "\n\n".join(filter(None, asked)), "assistant": _words(row["output"])}
    said = [{"role": role, "content": content} for role, content in turns.items() if content]
    return Exchange(said) if said else None


FORMS: dict[tuple[str, ...], Callable[[Message], Document | None]] = {
    ("text",): lambda row: _words(row["text"]),
    ("messages",): lambda row: _chat(row["messages"]),
    ("conversations",): lambda row: _chat(row["conversations"]),
    ("prompt", "completion"): _completed,
    ("instruction", "output"): _instructed,
}
"""By their fields, those that come first preferred. Alpaca's may have an `input`, too."""
FIELDS = {field for form in FORMS for field in form} | {"input"}


def _kind(value: Any) -> str:
    return type(value).__name__
