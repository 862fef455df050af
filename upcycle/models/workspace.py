"""The folder beside OUT in which a result grows until it is whole, and then takes its place."""

import ctypes
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import lock_descriptor
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save
from torch import Tensor

from upcycle.core.errors import AlreadyFinished, UpcycleError
from upcycle.core.foreign import blaming, parse_json
from upcycle.core.paths import check_name, sync, sync_tree, write_whole
from upcycle.models.record.file import RECORD, Identity

JOURNAL = "journal.jsonl"
BEGIN = b'{"fingerprint": "'
"""How a journal begins."""
ASIDE, RESULT, FORMER = "aside", "result", "former"
"""Folders beside the journal."""
NOT_OURS = "is not what upcycle writes: drop `resume` to start anew"


class Workspace:
    """The folder beside OUT in which a result grows until it is whole, with a journal of what is
    done.

    The result lies in a folder of its own below it, so that nothing else is ever published.

    Args:
        out: the folder that is to appear.
        run: what it is known by; a resume must have the same.
        resume: go on from what an earlier run left, and leave it again if this run stops.

    Raises:
        UpcycleError: there is nothing to resume that fits, another run is at work there, something
            lies there that no run made, or the folder can't be made.
    """

    def __init__(self, out: Path, run: Identity, *, resume: bool) -> None:
        self.out, self.run = out, run
        self.folder = partial_folder(out)
        self.result = result_folder(out)
        self.resume = resume
        self.records: dict[str, dict[str, Any]] = {}
        check_ours(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder)
        except OSError as error:
            raise UpcycleError(f"can't write beside {out}: {error.strerror}") from error
        try:
            _restore(out)
            self._open()
        except OSError as error:
            self.abandon()
            raise UpcycleError(f"can't write beside {out}: {error.strerror}") from error
        except UpcycleError:
            os.close(self._lock)
            raise

    def _open(self) -> None:
        entries = self._read_journal() if self.resume else []
        begun = _identity(entries[0]) if entries else None
        if begun is not None and begun == recorded_run(self.out):
            entries = []  # That run was killed after it had published.
        if not entries:
            _empty(self.folder)
            self._append(asdict(self.run))
        elif begun != self.run:
            raise UpcycleError(
                f"{self.folder} was begun with another source, text, recipe or version: repeat "
                "that request, or drop `resume` to start anew"
            )
        self.result.mkdir(exist_ok=True)
        self.records |= {entry["unit"]: entry["record"] for entry in entries[1:]}

    def _read_journal(self) -> list[dict[str, Any]]:
        """The entries of an earlier run."""
        journal = self.folder / JOURNAL
        if not journal.exists():
            return []
        try:
            lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
        except UnicodeDecodeError as error:
            raise UpcycleError(f"{journal} {NOT_OURS}") from error
        whole = [line for line in lines if line.endswith("\n")]
        if whole != lines:
            # A line cut short by a kill must not run into the next one.
            write_whole(journal, "".join(whole))
        entries = [parse_json(line, journal) for line in whole]
        keys = [entry.keys() if isinstance(entry, dict) else None for entry in entries]
        begin = asdict(self.run).keys()
        if entries and keys != [begin, *[{"unit", "record"}] * (len(entries) - 1)]:
            raise UpcycleError(f"{journal} {NOT_OURS}")
        return entries

    def keep(self, unit: str, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors aside that the rest of the run needs and the result does not hold."""
        path = self._aside(unit)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(save({name: t.contiguous() for name, t in tensors.items()}))

    def kept(self, unit: str) -> dict[str, Tensor]:
        """What was put aside for a unit."""
        path = self._aside(unit)
        with blaming(f"{path} is damaged, so drop `resume` to start anew"):
            return load_file(path)

    def _aside(self, unit: str) -> Path:
        return self.folder / ASIDE / f"{unit}.safetensors"

    def done(self, unit: str, record: dict[str, Any]) -> None:
        """Note that all tensors of a unit are on disk."""
        self.records[unit] = record
        self._append({"unit": unit, "record": record})

    def _append(self, entry: dict[str, Any]) -> None:
        with (self.folder / JOURNAL).open("a") as journal:
            journal.write(json.dumps(entry) + "\n")

    def publish(self, *, overwrite: bool) -> None:
        """Make the result the folder OUT, in place of a former one if that is to be overwritten.
        When this returns, it is on the disk."""
        if self.out.exists() and not overwrite and any(self.out.iterdir()):
            raise UpcycleError(f"{self.out} appeared meanwhile: pass `overwrite`")
        sync_tree(self.result)
        _exchange(self.result, self.out, self.folder / FORMER)
        sync(self.out.parent)
        _remove(self.folder)
        os.close(self._lock)

    def abandon(self) -> None:
        """Leave nothing behind, unless the run can be resumed."""
        if not self.resume:
            _remove(self.folder)
        os.close(self._lock)


def check_ours(folder: Path) -> None:
    """Raise unless a run of ours made the folder, or there is none, or nothing is in it.

    Raises:
        UpcycleError: it is a link, a file, or holds what no run has put there.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        kind = "a link" if folder.is_symlink() else "a file"
        raise UpcycleError(
            f"{folder} is {kind}, where a run would put its folder: move it away, or give another "
            "-o"
        )
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    known = names <= {JOURNAL, ASIDE, RESULT, FORMER}
    if names and not _begins_as_ours(folder / JOURNAL, known=known):
        raise UpcycleError(
            f"{folder} holds {min(names)!r} and was not made by upcycle: move it away, or give "
            "another -o"
        )


def _begins_as_ours(journal: Path, *, known: bool) -> bool:
    """Whether a journal is one; cut short by a kill, if what lies beside it has names of ours."""
    if journal.is_symlink() or not journal.is_file():
        return False
    with journal.open("rb") as file:
        begin = file.read(len(BEGIN))
    return begin == BEGIN or (known and BEGIN.startswith(begin))


def begun_run(out: Path) -> Identity | None:
    """The run that `--resume` would go on with, if there is one."""
    try:
        with (partial_folder(out) / JOURNAL).open(encoding="utf-8") as journal:
            return _identity(json.loads(journal.readline()))
    except (OSError, ValueError):
        return None


def recorded_run(out: Path) -> Identity | None:
    """The run that made a result, if there is one that says so."""
    try:
        return _identity(json.loads((out / RECORD).read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _identity(fields: Any) -> Identity | None:
    try:
        return TypeAdapter(Identity).validate_python(fields)
    except ValidationError:
        return None


def check_unfinished(out: Path, run: Identity, *, overwrite: bool) -> None:
    """Raise unless there is work left for a run that is resumed.

    Raises:
        AlreadyFinished: its result is there; what it may have left besides is deleted.
        UpcycleError: there is another result, which is not to be overwritten.
    """
    if recorded_run(out) == run:
        folder = partial_folder(out)
        check_ours(folder)
        if folder.is_dir():
            lock = _lock(folder)
            _remove(folder)
            os.close(lock)
        raise AlreadyFinished(out)
    check_replaceable(out, overwrite=overwrite)


def _empty(folder: Path) -> None:
    """Delete what is in a folder of ours; the folder stays, as its lock does. The journal goes
    last: until then it shows whose the rest is."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == JOURNAL):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove(folder: Path) -> None:
    """Delete a folder of ours, as far as the system lets us."""
    with suppress(OSError):
        _empty(folder)
        folder.rmdir()


def _exchange(new: Path, out: Path, former: Path) -> None:
    """Put the folder `new` in the place of `out`, in one step where the system can; else a kill
    between two steps leaves the former one in `former`, from where `_restore` takes it."""
    if not out.exists() or not any(out.iterdir()):
        new.rename(out)
    elif not _swapped(new, out):
        out.rename(former)
        try:
            new.rename(out)
        except BaseException:
            former.rename(out)
            raise


def _swapped(one: Path, other: Path) -> bool:
    """Whether two folders have changed places at once, which Linux can do on most file systems."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and not rename(here, os.fsencode(one), here, os.fsencode(other), swap)


def _restore(out: Path) -> None:
    """Put back the former result that a run was replacing when it was killed."""
    former = partial_folder(out) / FORMER
    if former.is_dir() and not out.exists():
        former.rename(out)
        sync(out.parent)


def _lock(folder: Path) -> int:
    """Take a folder for this process, until the descriptor is closed or the process ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    ours = True
    with suppress(OSError):  # some network file systems have no locks
        ours = lock_descriptor(descriptor, blocking=False)
    if not ours:
        os.close(descriptor)
        raise UpcycleError(
            f"{folder} belongs to a run that is still at work: wait for it, or give another -o"
        )
    return descriptor


def check_out(out: Path, source: Path, size: int, *, overwrite: bool, resume: bool = False) -> None:
    """Raise the errors about the output's place that can be known before the work.

    Args:
        source: the folder that is read from.
        size: bytes that will be written.
        resume: whether a result that is there may be the one that is asked for; see
            `check_replaceable`.
    """
    check_name(out)
    if out.exists() and not out.is_dir():
        raise UpcycleError(f"`out={out}` is a file: give a folder")
    if out.is_mount():
        raise UpcycleError(
            f"`out={out}` is a mount point, which the finished folder can't replace: give a folder "
            "inside it"
        )
    if source.resolve() == out or out in source.resolve().parents:
        raise UpcycleError(f"`out={out}` holds the source: give another folder")
    check_ours(partial_folder(out))
    if resume and recorded_run(out) is not None:
        return  # It may be finished, and then needs no room.
    check_replaceable(out, overwrite=overwrite)
    _check_room(out, size)


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Raise unless a result may take the place of what is at `out`, or was when a run that was
    replacing it was killed."""
    former = partial_folder(out) / FORMER
    present = former if former.is_dir() and not out.exists() else out
    if not present.exists() or not any(present.iterdir()):
        return
    if not overwrite:
        raise UpcycleError(f"`out={out}` exists and is not empty: choose another, or `overwrite`")
    if not (present / RECORD).is_file():
        raise UpcycleError(
            f"`out={out}` was not written by upcycle, so `overwrite` leaves it alone"
        )


def _check_room(out: Path, size: int) -> None:
    existing = next(p for p in out.parents if p.exists())
    if not existing.is_dir():
        raise UpcycleError(f"`out={out}`: {existing} is a file: give another folder")
    if not os.access(existing, os.W_OK):
        raise UpcycleError(f"`out={out}`: {existing} is not writable")
    free = shutil.disk_usage(existing).free
    needed = size + 64 * 2**20
    if partial_folder(out).exists():
        free += sum(p.stat().st_size for p in partial_folder(out).rglob("*"))
    if needed > free:
        raise UpcycleError(
            f"`out={out}` needs {needed / 1e9:.1f} GB, but {existing} has {free / 1e9:.1f} GB free"
        )


def partial_folder(out: Path) -> Path:
    """Where a run works."""
    return out.with_name(f".{out.name}.partial")


def result_folder(out: Path) -> Path:
    """Where its result grows."""
    return partial_folder(out) / RESULT
