"""A GGUF file, or all parts of one: its keys and tensors, before their values are read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from upcycle.core.errors import UpcycleError

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
NAMED = 5  # names in an error, at most
TOGETHER = 2**22  # values that are dequantised at a time, which takes several times their memory


@dataclass(frozen=True)
class GgufFile:
    """All parts of a file together."""

    label: str
    path: Path
    """The part that holds the metadata."""
    fields: Mapping[str, gguf.ReaderField]
    tensors: Mapping[str, gguf.ReaderTensor]

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.tensors

    def value(self, key: str) -> Any:
        """What a key of the metadata says; None if it is not there."""
        return self.fields[key].contents() if key in self.fields else None

    @property
    def architecture(self) -> str:
        return str(self.value("general.architecture"))

    def stored(self, name: str) -> Tensor:
        """A tensor's bytes, or its numbers where they are not quantised; in memory of its own."""
        return torch.from_numpy(np.array(self.tensors[name].data))

    def digest(self, name: str) -> str:
        """XXH3 of a tensor's bytes."""
        return xxh3_128_hexdigest(np.ascontiguousarray(self.tensors[name].data).view(np.uint8).data)

    def numbers(self, name: str, stored: Tensor | None = None) -> Tensor:
        """A tensor dequantised to float32.

        Args:
            stored: what `stored` returned for it, if that has been read.
        """
        tensor = self.tensors[name]
        data = tensor.data if stored is None else stored.numpy()
        rows = max(1, TOGETHER // int(tensor.shape[0]))
        values = np.empty(self.shape(name), dtype=np.float32)
        for start in range(0, len(values), rows):
            some_rows = slice(start, start + rows)
            values[some_rows] = gguf.dequantize(data[some_rows], tensor.tensor_type)
        return torch.from_numpy(values)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def check_types(self) -> None:
        """Raises:
        UpcycleError: a tensor is stored in a way that the gguf package does not read.
        """
        for kind, name in {t.tensor_type: name for name, t in self.tensors.items()}.items():
            try:
                gguf.dequantize(self.tensors[name].data[:1], kind)
            except NotImplementedError as error:
                raise UpcycleError(
                    f"{name} in {self.label} is stored as {kind.name}, which the gguf package "
                    "does not read: give a GGUF file of another quantisation"
                ) from error


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """Reads the words of a vocabulary several times as fast: every slice of a `memmap` is a
    `memmap`, which takes long to make."""

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        self._data = value.view(np.ndarray)


def open_gguf(label: str, path: Path) -> GgufFile:
    """The headers of a file and of the parts that belong to it.

    Raises:
        UpcycleError: a part is missing, or parts do not belong together.
    """
    state = path.stat()
    return replace(_opened(path, state.st_mtime_ns, state.st_size), label=label)


@lru_cache(maxsize=2)
def _opened(path: Path, changed: int, size: int) -> GgufFile:
    """A file as it was at that time, which is opened for every layer that is read."""
    label = str(path)
    paths = parts(path)
    readers = [_Reader(part) for part in paths]
    tensors: dict[str, gguf.ReaderTensor] = {}
    for number, (part, reader) in enumerate(zip(paths, readers, strict=True)):
        _check_part(part, reader, number, len(paths))
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise UpcycleError(f"{tensor.name} is in two parts of {label}")
            tensors[tensor.name] = tensor
    fields = {key: field for reader in reversed(readers) for key, field in reader.fields.items()}
    file = GgufFile(label, paths[0], fields, tensors)
    wanted = file.value("split.tensors.count")
    if wanted is not None and wanted != len(tensors):
        raise UpcycleError(
            f"{label} has {len(tensors)} tensors in {len(paths)} parts, but split.tensors.count "
            f"says {wanted}: a part is not whole"
        )
    return file


def parts(path: Path) -> list[Path]:
    """All parts of the file that this is a part of, by the names that llama.cpp gives them.

    Raises:
        UpcycleError: one is not there.
    """
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match[1], match[3]
    found = [path.with_name(f"{stem}-{i + 1:05}-of-{count}.gguf") for i in range(int(count))]
    missing = [part.name for part in found if not part.is_file()]
    if missing or path not in found:
        absent = some(missing) or "that number"
        raise UpcycleError(f"{path} is one of {int(count)} parts, and {absent} is not beside it")
    return found


def _check_part(part: Path, reader: gguf.GGUFReader, number: int, count: int) -> None:
    says = {
        key: int(reader.fields[f"split.{key}"].contents())
        for key in ("no", "count")
        if f"split.{key}" in reader.fields
    }
    its_number, its_count = says.get("no", number), says.get("count", count)
    if (its_number, its_count) == (number, count):
        return
    said = f"{part} says that it is part {its_number + 1} of {its_count}"
    if count == 1:
        raise UpcycleError(
            f"{said}: name all of them as llama.cpp does, NAME-00001-of-{its_count:05}.gguf"
        )
    raise UpcycleError(f"{said}, but its name says {number + 1} of {count}")


def some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
