"""Weights: read from the files into memory, and known again by digests of their bytes."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128, xxh3_128_hexdigest

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import blaming
from upcycle.models.quantised import LINK
from upcycle.models.shards import TensorInfo, read_headers, reading, same_values

HASH_BYTES = 2**20  # at a time, which stay in the cache of the processor


def read_tensors(
    folder: Path, tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, Tensor, str]]:
    """Tensors in their dtype, each with its name and the digest of its bytes in the files.

    Raises:
        UpcycleError: a tensor can't be read or dequantised.
    """
    by_file: dict[str, set[str]] = {}
    for info in tensors.values():
        for file, part in info.stored.values():
            by_file.setdefault(file, set()).add(part)
    found: dict[str, Tensor] = {}
    for file, members in by_file.items():
        with _opened(folder / file) as shard:
            found |= {part: shard.get_tensor(part) for part in members}
    for name, info in tensors.items():
        parts = {key: found.pop(part) for key, (_, part) in info.stored.items()}
        digest = _joined({key: xxh3_128_hexdigest(_bytes(part)) for key, part in parts.items()})
        yield name, _put_together(info, parts), digest


def _opened(path: Path) -> AbstractContextManager[Any]:
    return nullcontext(_gguf_shard(path)) if path.name == LINK else reading(path)


def _gguf_shard(link: Path) -> Any:
    from upcycle.models.gguf.source import GgufShard

    with blaming(f"{link.readlink()} is not a whole GGUF file"):
        return GgufShard(link)


def _put_together(info: TensorInfo, parts: dict[str, Tensor]) -> Tensor:
    if info.packed is None:
        return parts[""]
    with blaming(f"{info.name} in {info.file} can't be dequantised"):
        tensor = info.packed.unpack(parts).to(info.dtype).contiguous()
    if tensor.shape != info.shape:
        raise UpcycleError(
            f"{info.name} in {info.file} is dequantised to {list(tensor.shape)}, where its stored "
            f"size means {list(info.shape)}"
        )
    return tensor


def equal_matrices(folder: Path, one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors are the same, once they are dequantised."""
    if one.packed is None and other.packed is None:
        return same_values(folder, one, other)
    (_, mine, _), (_, theirs, _) = read_tensors(folder, {"one": one, "other": other})
    return torch.equal(mine, theirs)


def _bytes(tensor: Tensor) -> Any:
    return tensor.flatten().view(torch.uint8).numpy()


def fingerprint(folder: Path) -> str:
    """Of config.json and the tensors with all their bytes, of any checkpoint, dense or not.

    Raises:
        UpcycleError: a file is cut short.
    """
    tensors = read_headers(folder)
    return fingerprint_of(folder, tensors, digests_of(folder, tensors))


def fingerprint_of(
    folder: Path, tensors: Mapping[str, TensorInfo], digests: Mapping[str, str]
) -> str:
    """Of config.json and the tensors, whose bytes have these digests."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name in sorted(tensors):
        info = tensors[name]
        digest.update(json.dumps([name, str(info.dtype), info.shape, digests[name]]).encode())
    return digest.hexdigest()


def digests_of(folder: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Of every tensor's bytes, as they lie in the files."""
    found = hash_tensors(folder, {f for info in tensors.values() for f, _ in info.stored.values()})
    return {
        name: _joined({key: found.get(part, "absent") for key, (_, part) in info.stored.items()})
        for name, info in tensors.items()
    }


def _joined(digests: Mapping[str, str]) -> str:
    """One digest of what a tensor is put together from."""
    if digests.keys() == {""}:
        return digests[""]
    return xxh3_128_hexdigest(json.dumps(digests, sort_keys=True).encode())


def hash_tensors(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """XXH3 of every tensor's bytes in these files, by name: fast enough (over 10 GB a second) to
    be done with every run.

    Raises:
        UpcycleError: a file is cut short.
    """
    digests: dict[str, str] = {}
    for file in sorted(files):
        if file == LINK:
            digests |= _gguf_shard(folder / file).digests()
            continue
        with reading(folder / file), (folder / file).open("rb", buffering=0) as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
            header.pop("__metadata__", None)
            for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                start, end = info["data_offsets"]
                stream.seek(8 + size + start)
                digests[name] = _hash_next(stream, end - start)
    return digests


def _hash_next(stream: Any, size: int) -> str:
    """Of so many bytes of a file from where it stands."""
    digest, room = xxh3_128(), memoryview(bytearray(min(size, HASH_BYTES)))
    while size:
        count = stream.readinto(room[:size])
        if not count:
            raise OSError("the file ends before its tensors do")
        digest.update(room[:count])
        size -= count
    return digest.hexdigest()
