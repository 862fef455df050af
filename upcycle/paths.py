"""Where the user means, and files that are whole or absent."""

import os
import tempfile
from pathlib import Path

from upcycle.errors import UpcycleError


def local_path(name: str | Path) -> Path:
    """A path with ~ as the home folder. Unlike for `Path.expanduser`, ~ and a name that is no
    user's begin a path like any other."""
    return Path(os.path.expanduser(name))  # noqa: PTH111


def check_name(path: Path) -> None:
    """Refuse the name of a folder that weights can't be in.

    Raises:
        UpcycleError: it is not UTF-8, which safetensors does not open.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = str(path).encode(errors="replace").decode()
        raise UpcycleError(
            f"{shown} has a name that is not UTF-8, which safetensors can't open: rename it"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """The file whole or not at all, in place of a former one."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        part = Path(file.name)
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            file.close()
            part.chmod(0o666 & ~_umask())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _umask() -> int:
    """What open() would have left out; temporary files are for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
