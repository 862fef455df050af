"""The one exception that people see."""


class UpcycleError(Exception):
    """The request or its input is wrong: one sentence that names the value and the fix.

    The command line prints it and exits with code 2; nothing has been written.
    """


class Diverged(UpcycleError):
    """Training came to a loss or a gradient that is no number; the best state before is kept."""


class CheckFailed(Exception):
    """A finished conversion broke an invariant that it promises. A bug, never the user's fault."""
