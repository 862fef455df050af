"""Where the user means."""

import os
from pathlib import Path


def local_path(name: str | Path) -> Path:
    """A path with ~ as the home folder. Unlike for `Path.expanduser`, ~ and a name that is no
    user's begin a path like any other."""
    return Path(os.path.expanduser(name))  # noqa: PTH111
