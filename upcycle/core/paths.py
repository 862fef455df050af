"""Where the user means, what of that may be published, and files that are whole or absent."""

import errno
import glob
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor

from upcycle.core.errors import UpcycleError

HUB_ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"
DRAFT = ".draft"
"""What the name of a file ends in that is not whole yet; it begins with a dot and the file's."""


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
        raise UpcycleError(f"`revision={revision}` goes with a hub id, but {model} is a local path")
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
    """The file whole or not at all, in place of a former one; what is no file (a pipe, a device)
    is written to as it is."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """An empty file to write, which takes the place of `path` once the context ends well and its
    bytes are on the disk. The permissions stay those of a former one.

    Raises:
        OSError: there is no room, or no right to write there.
    """
    _clear_drafts(path)
    descriptor, name = tempfile.mkstemp(DRAFT, f".{path.name}.", path.parent)
    draft = Path(name)
    try:
        _locked(descriptor)
        with disk_errors():
            yield draft
        draft.chmod(path.stat().st_mode if path.exists() else 0o666 & ~_umask())
        sync(draft)
        draft.replace(path)
        sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)
        os.close(descriptor)


def _clear_drafts(path: Path) -> None:
    """Delete what killed processes left of this file: drafts that nobody holds locked."""
    for draft in path.parent.glob(f".{glob.escape(path.name)}.????????{DRAFT}"):
        descriptor = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if _locked(descriptor):
                draft.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Whether this process now holds the file until it closes it or ends, however it does. (A
    filelock.FileLock would lie beside the draft as one more file, which a kill leaves.)"""
    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError:  # Some network file systems have no locks.
        return False


@contextmanager
def disk_errors() -> Iterator[None]:
    """Within it, what the system refuses to safetensors is an OSError, as it is elsewhere."""
    from safetensors import SafetensorError  # here, so that help and errors need not wait for it

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems can't do that to a folder.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have a folder on the disk with all that is in it: files first, then the folders, the inner
    ones before the outer ones."""
    for below, _, files in os.walk(folder, topdown=False):
        for name in sorted(files):
            sync(Path(below, name))
        sync(Path(below))


def _umask() -> int:
    """What open() would have left out; temporary files are for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
