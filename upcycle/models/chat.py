"""Chats as the text that a tokenizer's template makes of them.

A template is a program that comes with a model. transformers keeps it in a sandbox, from where it
can't reach out, but in which it may run for ever, or until no memory is left. So it runs in a
process of its own, within bounds: one for all templates, which is started when it is first needed.
"""

import atexit
import functools
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import LONGEST

SECONDS = 10.0
"""For one chat, of which a thousand take one second."""
PROCESS = Path(__file__).with_name("chat_process.py")


class ChatRefused(Exception):
    """A template does not take a chat; with its reason."""


def render_chat(
    tokenizer: Any, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False
) -> str:
    """A chat by the tokenizer's own template, with its special tokens.

    Args:
        add_generation_prompt: go on to where the answer begins.

    Raises:
        ChatRefused: the template raises an error.
        UpcycleError: it does not come to an end.
    """
    answer = _render(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    return str(answer["text"])


def render_marked(
    tokenizer: Any, messages: list[dict[str, Any]]
) -> tuple[str, list[tuple[int, int]]]:
    """The same, and the characters, from and to, that its `{% generation %}` marks enclose."""
    answer = _render(tokenizer, messages, return_assistant_tokens_mask=True)
    return str(answer["text"]), [(begin, end) for begin, end in answer["marked"]]


def _render(tokenizer: Any, messages: list[dict[str, Any]], **settings: bool) -> dict[str, Any]:
    # What tokenizers' apply_chat_template does.
    request = dict(tokenizer.special_tokens_map) | {
        "conversations": [[{k: v for k, v in turn.items() if v is not None} for turn in messages]],
        "chat_template": tokenizer.get_chat_template(),
        **settings,
    }
    answer = _ask(json.dumps(request))
    if "refused" in answer:
        raise ChatRefused(answer["refused"][:LONGEST])
    if "text" not in answer:
        raise UpcycleError(
            f"the tokenizer's chat template does not come to an end ({answer['endless']}): give "
            "text without chats, or correct the template"
        )
    return answer


def _ask(request: str) -> dict[str, Any]:
    """What the process answers; it is ended if it does not do so in time."""
    process = _process()
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], SECONDS)
        line = process.stdout.readline() if ready else ""
    except BrokenPipeError:
        line, ready = "", [process.stdout]
    if not line:
        _process.cache_clear()
        process.kill()
        process.communicate()
        return {"endless": "it broke off" if ready else f"{SECONDS:.0f} s"}
    answer: dict[str, Any] = json.loads(line)
    return answer


@functools.cache
def _process() -> "subprocess.Popen[str]":
    # -P: the folder of this file holds a types.py.
    process = subprocess.Popen(
        [sys.executable, "-P", str(PROCESS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env=os.environ | {"USE_TORCH": "0", "PYTHONIOENCODING": "utf-8"},
        process_group=0,  # a Ctrl-C is for this process alone
    )
    atexit.register(process.kill)
    assert process.stdout is not None
    process.stdout.readline()  # imports may take longer than any chat
    return process
