"""Where dense weights come from: a folder, a hub id or a GGUF file. The only reader of weights."""

import hashlib
import json
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, modeling_utils
from xxhash import xxh3_128, xxh3_128_hexdigest

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import blamed, blaming, read_json
from upcycle.core.paths import check_model, check_name, local_path
from upcycle.core.types import all_finite
from upcycle.models.config_fields import check_fields, check_layers
from upcycle.models.download import LEGAL, Remote, download, remote_weights
from upcycle.models.families import FAMILIES, describe, is_encoder
from upcycle.models.families.base import unsupported_reason
from upcycle.models.holders import HOLDERS
from upcycle.models.layout import Layout
from upcycle.models.names import EMBEDDINGS, HEAD, plain_names
from upcycle.models.quantised import LINK, Packed, Part, dequantised, packing, quantization_of
from upcycle.models.sentences import sentence_files
from upcycle.models.traits import Architecture

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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


@dataclass(frozen=True)
class DenseSource:
    """A dense checkpoint whose tensors are read when asked for."""

    label: str
    """As the user named it."""
    folder: Path
    config: PreTrainedConfig
    """Of the text model."""
    arch: Architecture
    tensors: Mapping[str, TensorInfo]
    """By the names that transformers has for them; those of a text model that has other parts
    beside it, by the names that they have without these."""
    layout: Layout
    parts: frozenset[str]
    """Names of the tensors that are not the text model's."""
    notes: tuple[str, ...] = ()
    """What is not as config.json says."""
    revision: str | None = None
    """The commit of a hub id."""
    remote: Remote | None = field(default=None, repr=False)
    """The weights of a hub id that are not in `folder` before `fetch`."""
    temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)
    """Holds the config and tokenizer of a GGUF file for as long as the source lives."""
    digests: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Of every tensor's bytes, once `fingerprint` has looked at them: what is read later must be
    the same."""

    def fetch(self) -> None:
        """Download the weights if they are not here; to be called before any are read.

        Raises:
            UpcycleError: the hub does not give them.
        """
        if self.remote is not None:
            self.remote.fetch()

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
        found = {}
        asked = {name: self.tensors[name] for name in names}
        for name, tensor, digest in read_tensors(self.folder, asked):
            # What is not converted may have bounds that are infinite.
            if name not in self.parts and not all_finite(tensor):
                raise UpcycleError(f"{name} in {self.tensors[name].file} holds NaN or infinity")
            self._compare(name, digest)
            found[name] = tensor
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
        return _hash(self.folder, self.tensors)

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """A layer's tensors by their names below `model.layers.N.`, as the source spells them."""
        return self.read_place(f"model.layers.{layer}.", self.layer_names(layer))

    def read_place(self, place: str, names: list[str]) -> dict[str, Tensor]:
        """These tensors by their names below `place`, which they all begin with."""
        return {name.removeprefix(place): tensor for name, tensor in self.read(names).items()}

    def known(self, name: str) -> str:
        """What a tensor is known by here, of its name in the checkpoint or in the whole model."""
        for old, new in FAMILIES[self.arch.family].stored.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        return self.layout.short(name)

    def place(self, layer: int) -> str:
        """What the names of a layer's tensors begin with; layers that draft tokens are counted on
        after the others."""
        drafted = layer - self.arch.num_layers
        return f"model.layers.{layer}." if drafted < 0 else self.drafts[drafted]

    def layer_names(self, layer: int) -> list[str]:
        return [n for n in self.text_names if n.startswith(f"model.layers.{layer}.")]

    def outer_names(self) -> list[str]:
        """Tensors of the text model that belong to no layer."""
        return [n for n in self.text_names if not LAYER.fullmatch(n)]

    @cached_property
    def drafts(self) -> tuple[str, ...]:
        """What the names of the tensors of each layer that drafts tokens begin with."""
        drafts = FAMILIES[self.arch.family].drafts
        if drafts is None:
            return ()
        layers = re.compile(rf"{re.escape(drafts.place)}layers\.\d+\.")
        found = {match[0] for name in self.parts if (match := layers.match(name))}
        return tuple(sorted(found))

    def draft_names(self) -> list[str]:
        """Tensors of what drafts tokens."""
        drafts = FAMILIES[self.arch.family].drafts
        return [n for n in sorted(self.parts) if drafts is not None and n.startswith(drafts.place)]

    @cached_property
    def text_names(self) -> list[str]:
        return [n for n in self.tensors if n not in self.parts]

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
    return _digest(folder, tensors, _hash(folder, tensors))


def _hash(folder: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
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
    from upcycle.models.gguf_source import GgufShard

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


@dataclass(frozen=True)
class Deferred:
    """A quantised tensor as transformers asks for a part of a file: read when it is indexed."""

    folder: Path
    info: TensorInfo

    def __getitem__(self, part: Any) -> Tensor:
        ((_, tensor, _),) = read_tensors(self.folder, {self.info.name: self.info})
        return tensor[part]


def deferred(folder: Path) -> dict[str, Deferred]:
    """The tensors of a checkpoint of which some are quantised; none of any other, which
    transformers reads itself."""
    tensors = read_headers(folder)
    if all(info.packed is None for info in tensors.values()):
        return {}
    return {name: Deferred(folder, info) for name, info in tensors.items()}


def open_source(model: str, *, revision: str | None = None) -> DenseSource:
    """The dense checkpoint that MODEL names; reads headers, no weights. Of a hub id
    the weights stay where they are until `DenseSource.fetch`.

    Raises:
        UpcycleError: it is not there, is no model, is corrupt, or is of a family that upcycle
            does not know.
    """
    return open_located(model, locate(model, revision, accept=describe))


def open_located(model: str, found: "Checkpoint | None") -> DenseSource:
    """`open_source` of what `locate` found."""
    if found is None:
        return _open_gguf(model, local_path(model))
    local = local_path(model).is_dir()
    return _open_folder(model, found, revision=None if local else found.folder.name)


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


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder."""

    folder: Path
    remote: Remote | None = None
    """Its weights, if they are not in the folder yet."""

    def headers(self) -> dict[str, TensorInfo]:
        """As `read_headers`."""
        return read_headers(self.folder, self.remote.parts if self.remote else None)


def model_folder(model: str, revision: str | None) -> Path | None:
    """The folder that MODEL names, downloaded if it is a hub id; None for a GGUF file."""
    found = locate(model, revision)
    if found is None:
        return None
    if found.remote is not None:
        found.remote.fetch()
    return found.folder


def locate(
    model: str,
    revision: str | None,
    *,
    accept: Callable[[PreTrainedConfig], Any] = lambda config: None,
) -> Checkpoint | None:
    """What MODEL names, of a hub id without the weights that are not in the hub's cache; None for a
    GGUF file.

    `accept` may raise on the config of a hub id before anything else is fetched.
    """
    check_model(model, revision)
    path = local_path(model)
    check_name(path)
    if path.is_dir():
        return Checkpoint(path)
    if path.is_file():
        return None
    folder = download(model, revision, lambda folder: accept(read_config(folder)))
    return Checkpoint(
        folder, None if _weights_are_here(folder) else remote_weights(model, folder.name)
    )


def _weights_are_here(folder: Path) -> bool:
    try:
        return bool(_weight_files(folder))
    except UpcycleError:
        return False


def _open_folder(
    label: str,
    checkpoint: Checkpoint,
    *,
    revision: str | None = None,
    temporary: tempfile.TemporaryDirectory[str] | None = None,
) -> DenseSource:
    folder, remote = checkpoint.folder, checkpoint.remote
    whole = read_config(folder)
    config, arch = whole.get_text_config(), describe(whole)
    family = FAMILIES[arch.family]
    headers = checkpoint.headers()
    check_layers(arch.num_layers, len(headers), folder)
    layout = Layout.of(whole)
    expected = {layout.full(name) for name in layout.expected}
    begun = {**family.stored, **HOLDERS.get(whole.model_type, {})}
    stored = plain_names(headers, expected, layout.base, begun)
    kept = {n for n in stored if not BUFFER.search(n) and not family.unread.search(n)}
    found = {layout.short(n): headers[old] for n, old in stored.items() if n in kept}
    config.tie_word_embeddings |= whole.tie_word_embeddings
    config.tie_word_embeddings &= family.ties
    alike = found.keys() & {HEAD, EMBEDDINGS, *layout.twins}
    if remote is not None and config.tie_word_embeddings and len(alike) > 1:
        # Whether they are one is not in the headers.
        remote.fetch({found[name].file for name in alike})
    _settle_twins(folder, layout.twins, found)
    notes = (*_settle_head(folder, config, found), *_dequantised(found.values()))
    headless = is_headless(config, found)
    _verify(folder, layout, found, tied=config.tie_word_embeddings or headless)
    # Sorted: how the source is sharded must not show in the output.
    tensors = {name: found[name] for name in sorted(found)}
    parts = layout.parts(tensors)
    arch = replace(describe(whole), head=not headless)
    return DenseSource(
        *(label, folder, config, arch, tensors, layout, parts),
        *(notes, revision, remote, temporary),
    )


def is_headless(config: PreTrainedConfig, names: Iterable[str]) -> bool:
    """Whether a checkpoint of tensors of these names is an encoder without what makes logits of its
    hidden states, as it is stored for what is built on these."""
    tied = config.tie_word_embeddings
    return is_encoder(config) and not tied and not any(name.endswith(HEAD) for name in names)


def _settle_twins(folder: Path, twins: frozenset[str], tensors: dict[str, TensorInfo]) -> None:
    """Make one tensor of embeddings that are stored several times.

    Raises:
        UpcycleError: they are not the same.
    """
    for name in sorted(twins & tensors.keys()):
        info = tensors.pop(name)
        first = tensors.setdefault(EMBEDDINGS, info)
        if first is not info and not _equal_matrices(folder, first, info):
            raise UpcycleError(
                f"{name} in {info.file} holds other values than {first.name}, whose embeddings it "
                "shares: a model with both has no native MoE"
            )


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
    if _equal_matrices(folder, tensors[HEAD], tensors[EMBEDDINGS]):
        del tensors[HEAD]
        return ()
    config.tie_word_embeddings = False
    return (
        f"config.json ties the embeddings, but {HEAD} holds other values: it stays a tensor of its "
        "own, as in transformers",
    )


def _dequantised(tensors: Iterable[TensorInfo]) -> Iterator[str]:
    """What is to be said of quantised weights."""
    packed = [i for i in tensors if i.packed is not None and i.file != LINK]
    if packed:
        dtype = str(packed[0].dtype).removeprefix("torch.")
        yield (
            f"the source is quantised: {len(packed)} of its tensors are dequantised to {dtype}, "
            "and what quantising lost stays lost"
        )


def _equal_matrices(folder: Path, one: TensorInfo, other: TensorInfo) -> bool:
    if one.packed is None and other.packed is None:
        return _equal(folder, one, other)
    (_, mine, _), (_, theirs, _) = read_tensors(folder, {"one": one, "other": other})
    return torch.equal(mine, theirs)


def _equal(folder: Path, one: TensorInfo | Part, other: TensorInfo | Part) -> bool:
    """Whether two tensors are the same, which is read a piece at a time."""
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


def read_config(folder: Path) -> PreTrainedConfig:
    """config.json as transformers understands it; of a quantised model, that of the model which it
    is dequantised to.

    Raises:
        UpcycleError: it is missing, not JSON, not a config that transformers knows, or of weights
            that can't be dequantised.
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
    if fields["model_type"] not in CONFIG_MAPPING:
        raise UpcycleError(
            f"{path} is not a config that transformers reads: "
            f"{unsupported_reason(fields['model_type'])}"
        )
    quantization = quantization_of(fields)
    if quantization is not None:
        packing(quantization, str(path))
    if isinstance(fields.get("text_config"), dict):
        check_fields({"model_type": ""} | fields["text_config"], path)
    with blaming(f"{path} is not a config that transformers reads"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def read_text_config(folder: Path) -> PreTrainedConfig:
    """The same of its text model, where it has other parts, too."""
    return read_config(folder).get_text_config()


def _read_json(path: Path) -> dict[str, Any]:
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise UpcycleError(f"{path} is not a JSON object")
    return fields


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
    fields = _read_json(path) if path.is_file() else {}
    quantization = quantization_of(fields)
    if quantization is None:
        return {name: _plain(part, folder) for name, part in parts.items()}
    found = dequantised(parts, packing(quantization, str(path)))
    plain = {name: _plain(part, folder) for name, part in found.items() if isinstance(part, Part)}
    dtype = _dtype_of(fields, plain.values())
    return {name: plain.get(name) or _packed(name, found[name], dtype) for name in found}


def _gguf_headers(folder: Path) -> dict[str, TensorInfo]:
    from upcycle.models.gguf_source import gguf_tensors

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
    for file in _weight_files(folder):
        with reading(folder / file) as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                stored = shard.get_slice(name)
                part = Part(name, file, tuple(stored.get_shape()), stored.get_dtype())
                if name in parts and not _equal(folder, part, parts[name]):
                    raise UpcycleError(
                        f"{folder} holds {name} twice, in {parts[name].file} and {file}, "
                        "with other values: delete one"
                    )
                parts[name] = part
    return parts


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


def _verify(folder: Path, layout: Layout, tensors: Mapping[str, TensorInfo], *, tied: bool) -> None:
    """Raises:
    UpcycleError: the tensors are not those that the architecture has.
    """
    expected = {n: shape for n, shape in layout.expected.items() if n != HEAD or not tied}
    for name in sorted(expected.keys() - tensors.keys()):
        raise UpcycleError(
            f"{folder} lacks the tensor {layout.full(name)}, which config.json asks for"
        )
    for name in sorted(tensors.keys() - expected.keys()):
        if not layout.ignored.search(name):
            raise UpcycleError(
                f"{tensors[name].file} in {folder} holds {tensors[name].name}, which "
                f"{layout.config.model_type} does not have: it would be lost"
            )
    for name, info in tensors.items():
        if name in expected and info.shape != expected[name]:
            raise UpcycleError(
                f"{info.name} in {info.file} has shape {list(info.shape)}, but config.json asks "
                f"for {list(expected[name])}"
            )


def _open_gguf(label: str, path: Path) -> DenseSource:
    """A GGUF file, whose tensors are dequantised to float32 when they are read."""
    try:
        from upcycle.models.gguf_source import prepare
    except ImportError as error:
        raise UpcycleError(f"{label}: reading GGUF needs `pip install gguf`") from error
    temporary = tempfile.TemporaryDirectory(prefix="upcycle-gguf-")
    try:
        notes = prepare(label, path, Path(temporary.name), accept=describe)
    except UpcycleError:
        raise
    except Exception as error:  # readers of corrupt files raise anything
        raise blamed(error, f"{label} is not a whole GGUF file") from error
    source = _open_folder(label, Checkpoint(Path(temporary.name)), temporary=temporary)
    return replace(source, notes=(*source.notes, *notes))


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
    """Files that travel with a checkpoint as they are: tokenizer, generation config, licence, and
    what sentence-transformers puts behind an encoder.

    Raises:
        UpcycleError: as `own_file` and `sentence_files`.
    """
    patterns = (
        "tokenizer*", "*.model", "*.tiktoken", "vocab.*", "merges.txt", "special_tokens_map.json",
        "added_tokens.json", "chat_template*", "additional_chat_templates/*.jinja",
        "generation_config.json", "*processor_config.json", *LEGAL,
    )  # fmt: skip
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    found = {path for path in (*found, *sentence_files(folder)) if path.is_file()}
    yield from (own_file(path, folder) for path in sorted(found))
