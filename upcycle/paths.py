"""Where the user means, what of that may be published, and files that are whole or absent."""

import os
import re
import tempfile
from pathlib import Path

from upcycle.errors import UpcycleError

HUB_ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"


def local_path(name: str | Path) -> Path:
    """A path with ~ as the home folder. Unlike for `Path.expanduser`, ~ and a name that is no
    user's begin a path like any other."""
    return Path(os.path.expanduser(name))  # noqa: PTH111


def public_name(name: str | Path) -> str:
    """A hub's name as it is; of a local path only the last part, which may be published."""
    path = local_path(name)
    public = path.resolve().name if path.exists() else str(name)
    return os.fsencode(public).decode(errors="replace")  # a file's name need not be UTF-8


def check_model(model: str, revision: str | None = None) -> None:
    """Raise the errors about the name of a model that can be known without reading it.

    Raises:
        UpcycleError: it is neither a folder, a .gguf file nor, by its form, a hub id; or a local
            path with a revision.
    """
    path = local_path(model)
    if revision is not None and path.exists():
        raise UpcycleError(f"--revision {revision} goes with a hub id, but {model} is a local path")
    if path.is_file() and path.suffix != ".gguf":
        raise UpcycleError(f"{model} is a file: give the folder that holds config.json, or a .gguf")
    if not path.exists() and (path.suffix == ".gguf" or not re.fullmatch(HUB_ID, model)):
        raise UpcycleError(f"{model} does not exist: give a folder, a .gguf file or a hub id")


def way_from(folder: Path, place: Path) -> str:
    """The relative path from a folder to a place, by which it is found as long as both move
    together. It begins with `..` unless the place is inside; where both share no folder but the
    root, it would spell out the whole path of this machine, so it is the place's name alone."""
    folder, place = folder.resolve(), place.resolve()
    if folder.parts[:2] != place.parts[:2]:
        return place.name
    return Path(os.path.relpath(place, folder)).as_posix()


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
