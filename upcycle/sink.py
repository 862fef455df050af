"""Where the checkpoint goes: sharded safetensors written in place, resumable, renamed at the end.

Every tensor's shape is known before the first is written, so each has its place in its shard from
the start. Tensors go straight there, in any order, without a shard ever lying in memory; what a
killed run had written is still right when it is resumed.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from upcycle.errors import UpcycleError
from upcycle.foreign import blaming, parse_json
from upcycle.paths import check_name
from upcycle.source import DTYPES, INDEX, SINGLE

CODES = {dtype: code for code, dtype in DTYPES.items()}
JOURNAL = "journal.jsonl"
ASIDE = "aside"
NOT_OURS = "is not what upcycle writes: drop --resume to start anew"
WRITE_BYTES = 2**20
"""At a time. Longer writes may fill the page cache with huge pages, which can be dear to get: on a
virtual machine, writes of 138 MB took the kernel 4.3 s for 2.8 GB, these 0.5 s."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that is going to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Place:
    file: str
    offset: int
    spec: TensorSpec


class CheckpointWriter:
    """Writes the tensors of `specs`, each once, into safetensors shards in `folder`.

    A shard holds specs in their order, up to `max_shard_bytes` (at least one tensor).
    """

    def __init__(self, folder: Path, specs: Iterable[TensorSpec], max_shard_bytes: int) -> None:
        self.folder = folder
        self.places: dict[str, _Place] = {}
        shards = _pack(specs, max_shard_bytes)
        for number, shard in enumerate(shards, 1):
            single = len(shards) == 1
            file = SINGLE if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
            self._lay_out(file, shard)
        if len(shards) > 1:
            self._write_index()

    def _lay_out(self, file: str, specs: list[TensorSpec]) -> None:
        """Reserve the shard's room on disk and write its header (unless a run did so before)."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for spec in specs:
            start, end = end, end + spec.nbytes
            header[spec.name] = {
                "dtype": CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = 8 + len(text)
        for spec in specs:
            offset = data + header[spec.name]["data_offsets"][0]
            self.places[spec.name] = _Place(file, offset, spec)
        with (self.folder / file).open("r+b" if (self.folder / file).exists() else "w+b") as shard:
            _reserve(shard, data + end)
            shard.write(len(text).to_bytes(8, "little") + text)

    def _write_index(self) -> None:
        total = sum(place.spec.nbytes for place in self.places.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: place.file for name, place in self.places.items()},
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place; its shape and dtype must be the planned ones."""
        place = self.places[name]
        if tuple(tensor.shape) != place.spec.shape or tensor.dtype != place.spec.dtype:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, planned {place.spec}")
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        with (self.folder / place.file).open("r+b") as shard:
            shard.seek(place.offset)
            for start in range(0, len(data), WRITE_BYTES):
                shard.write(data[start : start + WRITE_BYTES].data)


def _reserve(shard: BinaryIO, size: int) -> None:
    """Take the room now, so that a full disk stops the run before the work and not after it."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(shard.fileno(), 0, size)
    else:
        shard.truncate(size)


def _pack(specs: Iterable[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    return shards


class Workspace:
    """The folder beside OUT in which a conversion grows until it is whole.

    Args:
        out: the folder that is to appear.
        fingerprint: of everything that the bytes depend on; a resume must have the same.
        resume: go on from what an earlier run left, and leave it again if this run stops.

    Raises:
        UpcycleError: there is nothing to resume that fits, another run is at work there, or the
            folder can't be made.
    """

    def __init__(self, out: Path, fingerprint: str, *, resume: bool) -> None:
        self.out = out
        self.folder = partial_folder(out)
        self.resume = resume
        self.records: dict[str, dict[str, Any]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder)
        except OSError as error:
            raise UpcycleError(f"can't write beside {out}: {error.strerror}") from error
        try:
            self._open(fingerprint)
        except OSError as error:
            self.abandon()
            raise UpcycleError(f"can't write beside {out}: {error.strerror}") from error
        except UpcycleError:
            os.close(self._lock)
            raise

    def _open(self, fingerprint: str) -> None:
        entries = self._read_journal() if self.resume else []
        if not entries:
            self._empty()
            self._append({"fingerprint": fingerprint})
        elif entries[0]["fingerprint"] != fingerprint:
            raise UpcycleError(
                f"{self.folder} was begun with another source, text, recipe or version: repeat "
                "that request, or drop --resume to start anew"
            )
        self.records |= {entry["unit"]: entry["record"] for entry in entries[1:]}

    def _empty(self) -> None:
        """What is left of a run that nobody wants to resume goes; the folder stays, as its lock
        does."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

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
            journal.write_text("".join(whole))
        entries = [parse_json(line, journal) for line in whole]
        keys = [entry.keys() if isinstance(entry, dict) else None for entry in entries]
        if entries and keys != [{"fingerprint"}, *[{"unit", "record"}] * (len(entries) - 1)]:
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
        with blaming(f"{path} is damaged, so drop --resume to start anew"):
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
        """Make the folder OUT, in place of a former OUT if that is to be overwritten."""
        former = self.out.with_name(f".{self.out.name}.former")
        if self.out.exists():
            if not overwrite and any(self.out.iterdir()):
                raise UpcycleError(f"{self.out} appeared while converting: pass --overwrite")
            shutil.rmtree(former, ignore_errors=True)
            self.out.rename(former)
        try:
            (self.folder / JOURNAL).unlink()
            shutil.rmtree(self.folder / ASIDE, ignore_errors=True)
            self.folder.rename(self.out)
        except BaseException:
            if former.exists():
                former.rename(self.out)
            raise
        shutil.rmtree(former, ignore_errors=True)
        os.close(self._lock)

    def abandon(self) -> None:
        """Leave nothing behind, unless the run can be resumed."""
        if not self.resume:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _lock(folder: Path) -> int:
    """Take a folder for this process, until the descriptor is closed or the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UpcycleError(
            f"{folder} belongs to a run that is still at work: wait for it, or give another -o"
        ) from error
    except OSError:
        pass  # some network file systems have no locks
    return descriptor


def check_out(out: Path, source: Path, size: int, *, overwrite: bool) -> None:
    """Raise the errors about the output's place that can be known before the work.

    Args:
        source: the folder that is read from.
        size: bytes that will be written.
    """
    check_name(out)
    if out.exists() and not out.is_dir():
        raise UpcycleError(f"-o {out} is a file: give a folder")
    if out.is_mount():
        raise UpcycleError(
            f"-o {out} is a mount point, which the finished folder can't replace: give a folder "
            "inside it"
        )
    if source.resolve() == out or out in source.resolve().parents:
        raise UpcycleError(f"-o {out} holds the source: give another folder")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise UpcycleError(f"-o {out} exists and is not empty: choose another, or --overwrite")
        if not (out / "upcycle.json").is_file():
            raise UpcycleError(
                f"-o {out} was not written by upcycle, so --overwrite leaves it alone"
            )
    existing = next(p for p in out.parents if p.exists())
    if not existing.is_dir():
        raise UpcycleError(f"-o {out}: {existing} is a file: give another folder")
    if not os.access(existing, os.W_OK):
        raise UpcycleError(f"-o {out}: {existing} is not writable")
    free = shutil.disk_usage(existing).free
    needed = size + 64 * 2**20
    if partial_folder(out).exists():
        free += sum(p.stat().st_size for p in partial_folder(out).rglob("*"))
    if needed > free:
        raise UpcycleError(
            f"-o {out} needs {needed / 1e9:.1f} GB, but {existing} has {free / 1e9:.1f} GB free"
        )


def partial_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")
