"""Which tokens of a chat the assistant wrote, by the tokenizer's own chat template."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.text import TEMPLATE_ERRORS, Document

MARKS = re.compile(r"\{%-?\s*generation\b")
"""What a template has around the assistant's words, if it says which they are."""


def assistant_tokens(
    tokenizer: Any, document: Document, folder: Path
) -> tuple[list[int], list[bool]]:
    """A chat's tokens, and which of them the assistant's turns are.

    Raises:
        UpcycleError: it is no chat, or the template in the folder does not tell.
    """
    if isinstance(document, str):
        raise UpcycleError(
            "assistant_only_loss trains on the assistant's turns, but the text is not all chats: "
            'give a .jsonl with "messages" on every line'
        )
    if tokenizer.chat_template is None:
        raise UpcycleError(
            f"assistant_only_loss needs a chat template, and the tokenizer in {folder} has none"
        )
    try:
        if MARKS.search(tokenizer.get_chat_template()):
            marked = tokenizer.apply_chat_template(
                document, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return list(marked["input_ids"]), [bool(mark) for mark in marked["assistant_masks"]]
        return _by_prefixes(tokenizer, document, folder)
    except TEMPLATE_ERRORS as error:
        raise UpcycleError(
            f"the chat template in {folder} refuses the messages {str(document)[:80]}: {error}"
        ) from error


def _by_prefixes(
    tokenizer: Any, chat: list[dict[str, Any]], folder: Path
) -> tuple[list[int], list[bool]]:
    """What each of the assistant's turns adds to the chat up to it and the prompt for an answer."""

    def rendered(turns: list[dict[str, Any]], *, prompt: bool = False) -> str:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        return str(text)

    whole, spans = rendered(chat), []
    for place, turn in enumerate(chat):
        if turn.get("role") != "assistant":
            continue
        before = rendered(chat[:place], prompt=True) if place else ""
        until = rendered(chat[: place + 1])
        if not (until.startswith(before) and whole.startswith(until) and tokenizer.is_fast):
            raise UpcycleError(
                f"the chat template in {folder} has no {{% generation %}} marks and renders turns "
                "otherwise as a chat goes on, so nobody can tell which tokens are the assistant's: "
                "add the marks, or drop assistant_only_loss"
            )
        spans.append((len(before), len(until)))
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    inside = [
        any(begin <= start and end <= stop for begin, stop in spans)
        for start, end in found["offset_mapping"]
    ]
    return list(found["input_ids"]), inside


def chat_stream(
    tokenizer: Any, chats: Iterable[Document], folder: Path, most: int
) -> tuple[list[int], list[bool]]:
    """Tokens of chats, each followed by the end-of-sequence token, until there are `most`, and
    which of them the assistant wrote."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    scored: list[bool] = []
    for chat in chats:
        if len(ids) >= most:
            break
        tokens, inside = assistant_tokens(tokenizer, chat, folder)
        ids += tokens + end
        scored += inside + [False] * len(end)
    return ids[:most], scored[:most]
