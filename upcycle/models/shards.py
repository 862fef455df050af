"""The files of a checkpoint's weights: which there are, and what their headers say."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import read_object
from upcycle.models.config import read_config
from upcycle.models.quantised import LINK, Packed, Part, dequantised, packing, quantization_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
COMPARED = 2**22  # values at a time


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file's header says of a tensor."""

    name: str
    """In the file."""
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    packed: Packed | None = None
    """How it is stored, if it is quantised; shape and dtype are those that it is read in."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored(self) -> dict[str, tuple[str, str]]:
        """File and name of what it is put together from, by what each of that is to it."""
        if self.packed is None:
            return {"": (self.file, self.name)}
        return {key: (part.file, part.name) for key, part in self.packed.parts.items()}


def read_headers(folder: Path, remote: Mapping[str, Part] | None = None) -> dict[str, TensorInfo]:
    """Every tensor of a folder's safetensors files, without its values. Those that are quantised
    count as what they are dequantised to.

    Args:
        remote: what is in those files, if they are not in the folder yet.

    Raises:
        UpcycleError: a file is missing, cut short, outside the folder, or holds weights that are
            quantised in a way that can't be undone.
    """
    if (folder / LINK).is_symlink():
        return _gguf_headers(folder)
    parts = _read_parts(folder) if remote is None else remote
    path = folder / "config.json"
    fields = read_object(path) if path.is_file() else {}
    quantization = quantization_of(fields)
    if quantization is None:
        return {name: _plain(part, folder) for name, part in parts.items()}
    found = dequantised(parts, packing(quantization, str(path)))
    plain = {name: _plain(part, folder) for name, part in found.items() if isinstance(part, Part)}
    dtype = _dtype_of(fields, plain.values())
    return {name: plain.get(name) or _packed(name, found[name], dtype) for name in found}


def _gguf_headers(folder: Path) -> dict[str, TensorInfo]:
    from upcycle.models.gguf.source import gguf_tensors

    found = gguf_tensors(folder / LINK, read_config(folder))
    return {name: _packed(name, packed, torch.float32) for name, packed in found.items()}


def _plain(part: Part, folder: Path) -> TensorInfo:
    dtype = DTYPES.get(part.dtype)
    if dtype is None:
        raise UpcycleError(
            f"{part.name} in {folder / part.file} is stored as {part.dtype}: upcycle reads "
            "float32, float16 and bfloat16 weights, and quantised ones where config.json has a "
            "quantization_config that says how"
        )
    return TensorInfo(part.name, part.file, part.shape, dtype)


def _packed(name: str, packed: Any, dtype: torch.dtype) -> TensorInfo:
    first = next(iter(packed.parts.values()))
    return TensorInfo(name, first.file, packed.shape, dtype, packed)


def _dtype_of(fields: Mapping[str, Any], plain: Iterable[TensorInfo]) -> torch.dtype:
    """What quantised weights are dequantised to: what config.json says, or what others are in."""
    inner = fields.get("text_config") or {}
    for said in (part.get(key) for part in (fields, inner) for key in ("dtype", "torch_dtype")):
        if getattr(torch, str(said), None) in DTYPES.values():
            dtype: torch.dtype = getattr(torch, str(said))
            return dtype
    counted = Counter(info.dtype for info in plain)
    return counted.most_common(1)[0][0] if counted else torch.bfloat16


def _read_parts(folder: Path) -> dict[str, Part]:
    """Every tensor of a folder's safetensors files as it lies there.

    Raises:
        UpcycleError: as `read_headers`, or two files hold other values under one name.
    """
    parts: dict[str, Part] = {}
    for file in weight_files(folder):
        with reading(folder / file) as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                stored = shard.get_slice(name)
                part = Part(name, file, tuple(stored.get_shape()), stored.get_dtype())
                if name in parts and not same_values(folder, part, parts[name]):
                    raise UpcycleError(
                        f"{folder} holds {name} twice, in {parts[name].file} and {file}, "
                        "with other values: delete one"
                    )
                parts[name] = part
    return parts


def weight_files(folder: Path) -> list[str]:
    """The names of a folder's safetensors files.

    Raises:
        UpcycleError: there are none, or the index names one that is missing or elsewhere.
    """
    if (folder / SINGLE).is_file():
        return [SINGLE]  # as transformers does, which leaves an older index beside it
    index = folder / INDEX
    if not index.is_file():
        pickles = any(folder.glob("*.bin"))
        hint = ": convert its .bin files to safetensors first" if pickles else ""
        raise UpcycleError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UpcycleError(f"{index} has no weight_map")
    files = sorted({str(file) for file in places.values()})
    there = {path.name for path in folder.iterdir() if path.is_file()}
    for file in files:
        if Path(file).name != file or file in (".", ".."):
            raise UpcycleError(f"{index} names {file[:80]!r}, which is outside its folder")
        if file not in there:  # no name is asked of the system: it may be no name of a file
            raise UpcycleError(f"{index} names {file[:80]!r}, which is not in {folder}")
    return files


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """A safetensors file that is read into memory and not mapped.

    Raises:
        UpcycleError: it is not one, is cut short, or can't be read.
    """
    try:
        with safe_open(path, framework="pt", backend="pread") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise UpcycleError(f"{path} is not a whole safetensors file: {error}") from error


def same_values(folder: Path, one: TensorInfo | Part, other: TensorInfo | Part) -> bool:
    """Whether two tensors are stored alike, which are read a piece at a time."""
    if one.shape != other.shape or not one.shape:
        return False
    with reading(folder / one.file) as ones, reading(folder / other.file) as others:
        mine, theirs = ones.get_slice(one.name), others.get_slice(other.name)
        step = max(1, COMPARED * one.shape[0] // max(1, math.prod(one.shape)))
        ends = ((row, min(row + step, one.shape[0])) for row in range(0, one.shape[0], step))
        return all(_same(mine[row:end], theirs[row:end]) for row, end in ends)


def _same(one: Tensor, other: Tensor) -> bool:
    """torch compares no numbers of eight bits or less that are not whole."""
    if one.dtype == other.dtype and one.dtype.itemsize == 1:
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(one, other)
