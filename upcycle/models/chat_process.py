"""Renders chats for `chat.py`, in a process of its own: a line of JSON in, a line of JSON out.

Nothing of upcycle is imported here, and no torch: it is to be there at once.
"""

import contextlib
import json
import sys

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

MEMORY = 4 * 2**30
"""Bytes that the process may take in all."""


def answer(request: dict[str, object]) -> dict[str, object]:
    """The text, or the template's error."""
    try:
        rendered, marked = render_jinja_template(**request)
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        return {"refused": str(error) or type(error).__name__}
    except (RecursionError, MemoryError, OverflowError) as error:
        return {"endless": type(error).__name__}
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    return {"text": rendered[0], "marked": marked[0] if marked else []}


def main() -> None:
    """Answer until stdin ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # on a system without such limits
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        least = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (least, hard))
    sys.stdout.write("\n")  # all is imported
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


main()
