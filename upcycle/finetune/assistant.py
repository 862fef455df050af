"""Which tokens of a chat the assistant wrote, by the tokenizer's own chat template."""

import re
from collections.abc import Iterable

from upcycle.core.errors import UpcycleError
from upcycle.models.chat import ChatRefused, render_chat, render_marked
from upcycle.models.rows import Document, Message
from upcycle.models.tokens import Reader

MARKS = re.compile(r"\{%-?\s*generation\b")
"""What a template has around the assistant's words, if it says which they are."""


def assistant_tokens(reader: Reader, document: Document) -> tuple[list[int], list[bool]]:
    """A chat's tokens, as `Reader.ids` has them, and which of them the assistant's turns are.

    Raises:
        UpcycleError: it is no chat, or the template does not tell.
    """
    if isinstance(document, str):
        raise UpcycleError(
            "`assistant_only_loss` trains on the assistant's turns, but the text is not all chats: "
            'give a .jsonl with "messages" on every line'
        )
    if reader.tokenizer.chat_template is None:
        raise UpcycleError(
            "`assistant_only_loss` needs a chat template, and the tokenizer in "
            f"{reader.folder} has none"
        )
    try:
        text, spans = _marked(reader, list(document))
    except ChatRefused as error:
        raise UpcycleError(
            f"the chat template in {reader.folder} refuses the messages "
            f"{str(document)[:80]}: {error}"
        ) from error
    found = reader.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = [
        any(begin <= start and end <= stop for begin, stop in spans)
        for start, end in found["offset_mapping"]
    ]
    return _trimmed(reader, list(found["input_ids"]), inside)


def _marked(reader: Reader, chat: list[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The chat as text, and the assistant's characters: by the template's own marks, or what each
    of its turns adds to the chat up to it and the prompt for an answer."""
    tokenizer = reader.tokenizer
    if not tokenizer.is_fast:
        raise UpcycleError(
            f"the tokenizer in {reader.folder} does not tell which characters its tokens stand "
            "for: add a tokenizer.json, or drop `assistant_only_loss`"
        )
    if MARKS.search(tokenizer.get_chat_template()):
        return render_marked(tokenizer, chat)
    whole, spans = render_chat(tokenizer, chat), []
    for place, turn in enumerate(chat):
        if turn.get("role") != "assistant":
            continue
        before = ""
        if place:
            before = render_chat(tokenizer, chat[:place], add_generation_prompt=True)
        until = render_chat(tokenizer, chat[: place + 1])
        if not (until.startswith(before) and whole.startswith(until)):
            raise UpcycleError(
                f"the chat template in {reader.folder} has no {{% generation %}} marks and renders "
                "turns otherwise as a chat goes on, so nobody can tell which tokens are the "
                "assistant's: add the marks, or drop `assistant_only_loss`"
            )
        spans.append((len(before), len(until)))
    return whole, spans


def _trimmed(reader: Reader, ids: list[int], inside: list[bool]) -> tuple[list[int], list[bool]]:
    """Without what windows bring, and with one end of sequence, whoever wrote it."""
    front, end = len(reader.front), reader.tokenizer.eos_token_id
    while front and tuple(ids[:front]) == reader.front:
        ids, inside = ids[front:], inside[front:]
    if end is None:
        return ids, inside
    by_assistant = False
    while ids and ids[-1] == end:
        by_assistant = inside[-1]
        ids, inside = ids[:-1], inside[:-1]
    return ([*ids, end], [*inside, by_assistant]) if ids else ([], [])


def chat_stream(
    reader: Reader, chats: Iterable[Document], most: int
) -> tuple[list[int], list[bool]]:
    """Tokens of chats, one after the other, until there are `most`, and which of them the
    assistant wrote."""
    ids: list[int] = []
    scored: list[bool] = []
    for chat in chats:
        if len(ids) >= most:
            break
        tokens, inside = assistant_tokens(reader, chat)
        ids += tokens
        scored += inside
    return ids[:most], scored[:most]
