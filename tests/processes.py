"""Processes that are killed in the middle of their work."""

import os
import signal
import time


def killed(act, after=None) -> bool:
    """Whether the function, in a process of its own, ended by a kill; its own, or ours after so
    many seconds."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            act()
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
