"""The exceptions that people see."""

from pathlib import Path


class UpcycleError(Exception):
    """The request or its input is wrong: one sentence that names the value and the fix.

    The command line prints it and exits with code 2; nothing has been written.
    """


class Diverged(UpcycleError):
    """Training came to a loss or a gradient that is no number; the best state before is kept."""


class CheckFailed(Exception):
    """A finished conversion broke an invariant that it promises. A bug, never the user's fault."""


class AlreadyFinished(Exception):
    """A run that was to be resumed has left its result, so there is nothing to do.

    The command line says so and exits with code 0, so that a loop around `--resume` ends.
    """

    def __init__(self, out: Path) -> None:
        super().__init__(f"{out} is the finished result of this run: nothing is left to do")
        self.out = out
