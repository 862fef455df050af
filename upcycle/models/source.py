"""Where dense weights come from: a folder, a hub id or a GGUF file. The only reader of weights."""

import hashlib
import json
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, modeling_utils
from xxhash import xxh3_128, xxh3_128_hexdigest

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import blamed, blaming, read_json
from upcycle.core.paths import check_model, check_name, local_path
from upcycle.core.types import all_finite
from upcycle.models.config_fields import check_fields, check_layers
from upcycle.models.families import FAMILIES, describe
from upcycle.models.names import EMBEDDINGS, HEAD, plain_names
from upcycle.models.stream import skeleton
from upcycle.models.traits import Architecture

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LEGAL = tuple(
    "".join(
        f"[{letter.lower()}{letter.upper()}]" if letter.isalpha() else letter for letter in name
    )
    for name in ("*license*", "*licence*", "*notice*", "*use_policy*", "copying*")
)
"""Names of what a model's terms are in, in any case."""
DOWNLOAD = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", *LEGAL]
PLACES = (
    *("name_or_path", "_name_or_path", "tokenizer_file", "special_tokens_map_file"),
    *("vocab_file", "merges_file"),
)
"""Fields of tokenizer_config.json in which some versions leave paths of their machine."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
HASH_BYTES = 2**20  # at a time, which stay in the cache of the processor
BUFFER = re.compile(r"rotary_emb\.inv_freq$")  # worked out anew by every forward pass
COMPARED = 2**22  # values at a time
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file's header says of a tensor."""

    name: str
    """In the file."""
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class DenseSource:
    """A dense checkpoint whose tensors are read when asked for."""

    label: str
    """As the user named it."""
    folder: Path
    config: PreTrainedConfig
    arch: Architecture
    tensors: Mapping[str, TensorInfo]
    """By the names that transformers has for them."""
    notes: tuple[str, ...] = ()
    """What is not as config.json says."""
    revision: str | None = None
    """The commit of a hub id."""
    temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)
    """Holds the dequantised weights of a GGUF file for as long as the source lives."""
    digests: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Of every tensor's bytes, once `fingerprint` has looked at them: what is read later must be
    the same."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; where there are several, the one that transformers loads them all in."""
        if self.config.dtype in DTYPES.values() and len(self.dtypes) > 1:
            dtype: torch.dtype = self.config.dtype
            return dtype
        return next(iter(self.dtypes))

    @cached_property
    def dtypes(self) -> dict[torch.dtype, int]:
        """How many weights each dtype has, that of the most first."""
        weights: Counter[torch.dtype] = Counter()
        for info in self.tensors.values():
            weights[info.dtype] += math.prod(info.shape)
        return dict(weights.most_common())

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """These tensors, in memory of their own: a mapped file that is cut short would end the
        process.

        Raises:
            UpcycleError: a tensor holds NaN or infinity, can't be read, or has changed.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        found: dict[str, Tensor] = {}
        for file, members in by_file.items():
            with reading(self.folder / file) as shard:
                found |= {name: shard.get_tensor(self.tensors[name].name) for name in members}
        for name, tensor in found.items():
            if not all_finite(tensor):
                raise UpcycleError(f"{name} in {self.tensors[name].file} holds NaN or infinity")
            self._compare(name, xxh3_128_hexdigest(_bytes(tensor)))
        return found

    def _compare(self, name: str, digest: str) -> None:
        if self.digests.get(name, digest) != digest:
            raise UpcycleError(
                f"{name} in {self.folder / self.tensors[name].file} changed while it was read: "
                "leave the source as it is, and start anew"
            )

    def verify(self) -> None:
        """Read all bytes again, as a check does that others do the reading for.

        Raises:
            UpcycleError: they are no longer those of `fingerprint`.
        """
        for name, digest in self._hash().items():
            self._compare(name, digest)

    def _hash(self) -> dict[str, str]:
        found = hash_tensors(self.folder, {info.file for info in self.tensors.values()})
        return {name: found.get(info.name, "absent") for name, info in self.tensors.items()}

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """A layer's tensors by their names below `model.layers.N.`, as the source spells them."""
        prefix = f"model.layers.{layer}."
        found = self.read(self.layer_names(layer))
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    def layer_names(self, layer: int) -> list[str]:
        return [n for n in self.tensors if n.startswith(f"model.layers.{layer}.")]

    def outer_names(self) -> list[str]:
        """Tensors that belong to no layer."""
        return [n for n in self.tensors if not LAYER.fullmatch(n)]

    def embedding_names(self) -> list[str]:
        """Tensors by which the first hidden states are made of tokens."""
        places = tuple(f"model.{name}." for name in FAMILIES[self.arch.family].blocks.embeddings)
        return [n for n in self.tensors if n.startswith(places)]

    def canonical(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under llama's names."""
        rewrite = FAMILIES[self.arch.family].rewrite
        return {
            new: moved
            for name, tensor in tensors.items()
            for new, moved in rewrite(name, tensor, self.config).items()
        }

    def fingerprint(self) -> str:
        """Of config.json and the tensors with all their bytes; what is read from now on must be
        what was read for it.

        Raises:
            UpcycleError: a file is cut short.
        """
        if not self.digests:
            self.digests.update(self._hash())
        return _digest(self.folder, self.tensors, self.digests)


def fingerprint(folder: Path) -> str:
    """The same of any checkpoint, dense or not."""
    tensors = read_headers(folder)
    digests = hash_tensors(folder, {info.file for info in tensors.values()})
    return _digest(folder, tensors, digests)


def _digest(folder: Path, tensors: Mapping[str, TensorInfo], digests: Mapping[str, str]) -> str:
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name in sorted(tensors):
        info = tensors[name]
        digest.update(json.dumps([name, str(info.dtype), info.shape, digests[name]]).encode())
    return digest.hexdigest()


def hash_tensors(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """XXH3 of every tensor's bytes in these files, by name: fast enough (over 10 GB a second) to
    be done with every run.

    Raises:
        UpcycleError: a file is cut short.
    """
    digests = {}
    for file in sorted(files):
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


def _bytes(tensor: Tensor) -> Any:
    return tensor.flatten().view(torch.uint8).numpy()


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


@contextmanager
def reading_whole() -> Iterator[None]:
    """Within it, transformers reads a checkpoint into memory. It maps the files otherwise, and as
    long as the model lives, one that changes changes the weights, and one that is cut short ends
    the process without a word."""
    modeling_utils.safe_open = _Unmapped
    try:
        yield
    finally:
        modeling_utils.safe_open = safe_open


class _Unmapped:
    """`safe_open` as transformers calls it, but for how the bytes are read."""

    def __init__(self, path: Any, **settings: Any) -> None:
        self.shard: Any = safe_open(path, **settings | {"backend": "pread"})

    def __enter__(self) -> "_Unmapped":
        return self

    def __exit__(self, *error: Any) -> None:
        self.shard.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shard, name)

    def get_slice(self, name: str) -> Any:
        part = self.shard.get_slice(name)
        # safetensors 0.8 refuses to read no bytes of a slice.
        return part if math.prod(part.get_shape()) else self.shard.get_tensor(name)


def open_source(model: str, *, revision: str | None = None) -> DenseSource:
    """The dense checkpoint that MODEL names; reads headers, no weights (but all of a GGUF file).

    Raises:
        UpcycleError: it is not there, is no model, is corrupt, or is of a family that upcycle
            does not know.
    """
    folder = model_folder(model, revision, accept=describe)
    if folder is None:
        return _open_gguf(model, local_path(model))
    local = local_path(model).is_dir()
    return _open_folder(model, folder, revision=None if local else folder.name)


@contextmanager
def checkpoint_folder(model: str) -> Iterator[Path]:
    """The folder of any checkpoint, dense or not; a GGUF file's goes with the context.

    Raises:
        UpcycleError: it is not there.
    """
    folder = model_folder(model, None)
    if folder is not None:
        yield folder
    else:
        source = open_source(model)
        yield source.folder


def model_folder(
    model: str,
    revision: str | None,
    *,
    accept: Callable[[PreTrainedConfig], Any] = lambda config: None,
) -> Path | None:
    """The folder that MODEL names, downloaded if it is a hub id; None for a GGUF file.

    `accept` may raise on the config of a hub id before its weights are fetched.
    """
    check_model(model, revision)
    path = local_path(model)
    check_name(path)
    if path.is_dir():
        return path
    if path.is_file():
        return None
    return _download(model, revision, accept)


def _open_folder(
    label: str,
    folder: Path,
    *,
    revision: str | None = None,
    temporary: tempfile.TemporaryDirectory[str] | None = None,
) -> DenseSource:
    config = read_config(folder)
    arch = describe(config)
    if not FAMILIES[config.model_type].ties:
        config.tie_word_embeddings = False
    headers = read_headers(folder)
    check_layers(arch.num_layers, len(headers), folder)
    model = skeleton(config)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    family = FAMILIES[config.model_type]
    stored = plain_names(headers, expected, model.base_model_prefix, family.stored)
    found = {name: headers[old] for name, old in stored.items() if not BUFFER.search(name)}
    notes = _settle_head(folder, config, found)
    if config.tie_word_embeddings:
        expected.pop(HEAD, None)
    _verify(folder, config.model_type, found, expected)
    # Sorted: how the source is sharded must not show in the output.
    tensors = {name: found[name] for name in sorted(found)}
    return DenseSource(label, folder, config, describe(config), tensors, notes, revision, temporary)


def _settle_head(
    folder: Path, config: PreTrainedConfig, tensors: dict[str, TensorInfo]
) -> tuple[str, ...]:
    """Make one tensor of a tied head and embeddings, and untie what was stored as two, as
    transformers does; returns what is to be said of that."""
    if not config.tie_word_embeddings or HEAD not in tensors:
        return ()
    if EMBEDDINGS not in tensors:
        tensors[EMBEDDINGS] = tensors.pop(HEAD)
        return ()
    if _equal(folder, tensors[HEAD], tensors[EMBEDDINGS]):
        del tensors[HEAD]
        return ()
    config.tie_word_embeddings = False
    return (
        f"config.json ties the embeddings, but {HEAD} holds other values: it stays a tensor of its "
        "own, as in transformers",
    )


def _equal(folder: Path, one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors are the same, which is read a piece at a time."""
    if one.shape != other.shape or not one.shape:
        return False
    with reading(folder / one.file) as ones, reading(folder / other.file) as others:
        mine, theirs = ones.get_slice(one.name), others.get_slice(other.name)
        step = max(1, COMPARED * one.shape[0] // max(1, math.prod(one.shape)))
        ends = ((row, min(row + step, one.shape[0])) for row in range(0, one.shape[0], step))
        return all(torch.equal(mine[row:end], theirs[row:end]) for row, end in ends)


def read_config(folder: Path) -> PreTrainedConfig:
    """config.json as transformers understands it.

    Raises:
        UpcycleError: it is missing, not JSON, or not a config that transformers knows.
    """
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not path.is_file():
        raise UpcycleError(
            f"{folder} holds a low-rank adapter, no model: "
            "`upcycle finetune --merge` writes a model instead"
        )
    if not path.is_file():
        raise UpcycleError(f"{folder} holds no config.json, so it is not a model folder")
    fields = _read_json(path)
    if "model_type" not in fields:
        raise UpcycleError(f"{path} has no model_type, so it is not a transformers model")
    check_fields(fields, path)
    with blaming(f"{path} is not a config that transformers reads"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return config


def _read_json(path: Path) -> dict[str, Any]:
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise UpcycleError(f"{path} is not a JSON object")
    return fields


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder's safetensors files, without its values.

    Raises:
        UpcycleError: a file is missing, cut short, outside the folder, or holds quantised weights.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(folder):
        with reading(folder / file) as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                part = shard.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise UpcycleError(
                        f"{name} in {folder / file} is stored as {part.get_dtype()}: upcycle "
                        "reads float32, float16 and bfloat16 weights, not quantised ones"
                    )
                info = TensorInfo(name, file, tuple(part.get_shape()), dtype)
                if name in tensors and not _equal(folder, info, tensors[name]):
                    raise UpcycleError(
                        f"{folder} holds {name} twice, in {tensors[name].file} and {file}, "
                        "with other values: delete one"
                    )
                tensors[name] = info
    return tensors


def _weight_files(folder: Path) -> list[str]:
    if (folder / SINGLE).is_file():
        return [SINGLE]  # as transformers does, which leaves an older index beside it
    index = folder / INDEX
    if not index.is_file():
        pickles = any(folder.glob("*.bin"))
        hint = ": convert its .bin files to safetensors first" if pickles else ""
        raise UpcycleError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")
    places = _read_json(index).get("weight_map")
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


def _verify(
    folder: Path,
    family: str,
    tensors: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises:
    UpcycleError: the tensors are not those that the architecture has.
    """
    for name in sorted(expected.keys() - tensors.keys()):
        raise UpcycleError(f"{folder} lacks the tensor {name}, which config.json asks for")
    for name in sorted(tensors.keys() - expected.keys()):
        raise UpcycleError(
            f"{tensors[name].file} in {folder} holds {tensors[name].name}, which {family} does not "
            "have: it would be lost"
        )
    for name, info in tensors.items():
        if info.shape != expected[name]:
            raise UpcycleError(
                f"{info.name} in {info.file} has shape {list(info.shape)}, but config.json asks "
                f"for {list(expected[name])}"
            )


def _download(model: str, revision: str | None, accept: Callable[[PreTrainedConfig], Any]) -> Path:
    """The model's folder in the hub cache; config.json first."""
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    try:
        config = hf_hub_download(model, "config.json", revision=revision)
        accept(read_config(Path(config).parent))
        return Path(snapshot_download(model, revision=revision, allow_patterns=DOWNLOAD))
    except errors.GatedRepoError as error:
        raise UpcycleError(
            f"{model} is gated: accept its terms on the hub, then run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UpcycleError(f"{model} has no revision {revision!r}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UpcycleError(f"{model} is neither a folder here nor a model on the hub") from error
    except errors.RemoteEntryNotFoundError as error:
        raise UpcycleError(f"{model} on the hub holds no config.json") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise UpcycleError(
            f"{model} is not in the local cache and the hub can't be reached (offline): "
            "give a local folder, or connect"
        ) from error


def _open_gguf(label: str, path: Path) -> DenseSource:
    """A GGUF file, dequantised to float32 in a temporary folder."""
    try:
        from upcycle.models.gguf_source import unpack
    except ImportError as error:
        raise UpcycleError(f"{label}: reading GGUF needs `pip install gguf`") from error
    temporary = tempfile.TemporaryDirectory(prefix="upcycle-gguf-")
    try:
        unpack(label, path, Path(temporary.name), accept=describe)
    except UpcycleError:
        raise
    except Exception as error:  # readers of corrupt files raise anything
        raise blamed(error, f"{label} is not a whole GGUF file") from error
    return _open_folder(label, Path(temporary.name), temporary=temporary)


def own_file(path: Path, folder: Path) -> Path:
    """The path of a file below a checkpoint's folder that may go into a result. What is a link may
    lead to a file that nobody meant to publish.

    Raises:
        UpcycleError: it leads out of the folder (or, in the hub's cache, out of the blobs of the
            same repository).
    """
    home, target = folder.resolve(), path.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise UpcycleError(
            f"{path} is a link out of its folder, to {target}, which would be published with the "
            "result: put a copy in its place, or delete the link"
        )
    return path


def check_own_files(folder: Path) -> None:
    """Raise before the work what would keep a checkpoint's files from going along.

    Raises:
        UpcycleError: one is a link out of the folder.
    """
    for path in (folder / "config.json", folder / "README.md", *companions(folder)):
        own_file(path, folder)


def copy_companions(folder: Path, place: Path) -> None:
    for path in companions(folder):
        copy = place / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    _drop_places(place / "tokenizer_config.json")


def _drop_places(path: Path) -> None:
    """A tokenizer's settings are published, so they name no place on the machine of their author.
    Nobody reads these fields."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # there is none, or transformers says what is wrong with it
    if not isinstance(fields, dict):
        return
    found = [key for key in PLACES if Path(str(fields.get(key))).is_absolute()]
    if found:
        kept = {key: value for key, value in fields.items() if key not in found}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def companions(folder: Path) -> Iterator[Path]:
    """Files that travel with a checkpoint as they are: tokenizer, generation config, licence.

    Raises:
        UpcycleError: as `own_file`.
    """
    patterns = (
        "tokenizer*", "*.model", "*.tiktoken", "vocab.*", "merges.txt", "special_tokens_map.json",
        "added_tokens.json", "chat_template*", "additional_chat_templates/*.jinja",
        "generation_config.json", *LEGAL,
    )  # fmt: skip
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    yield from (own_file(path, folder) for path in sorted(found))
