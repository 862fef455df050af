"""Where dense weights come from: a folder, a hub id or a GGUF file. The only reader of weights."""

import hashlib
import io
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, modeling_utils
from xxhash import xxh3_128, xxh3_128_hexdigest

from upcycle.architecture import Architecture
from upcycle.dense import skeleton
from upcycle.errors import UpcycleError
from upcycle.families import FAMILIES, describe
from upcycle.frontmatter import write_gguf_card
from upcycle.paths import local_path
from upcycle.types import all_finite

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DOWNLOAD = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "README.md"]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# What transformers raises on a config whose fields are wrong.
CONFIG_ERRORS = (
    ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, StrictDataclassError,
)  # fmt: skip
HASH_BYTES = 2**20  # at a time, which stay in the cache of the processor
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file's header says of a tensor."""

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
    revision: str | None = None
    """The commit of a hub id."""
    temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)
    """Holds the dequantised weights of a GGUF file for as long as the source lives."""
    digests: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Of every tensor's bytes, once `fingerprint` has looked at them: what is read later must be
    the same."""

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.tensors.values())).dtype

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
                found |= {name: shard.get_tensor(name) for name in members}
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
        return {name: found.get(name, "absent") for name in self.tensors}

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
    path = local_path(model)
    if revision is not None and path.exists():
        raise UpcycleError(f"--revision {revision} goes with a hub id, but {model} is a local path")
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return None
        raise UpcycleError(f"{model} is a file: give the folder that holds config.json, or a .gguf")
    if path.suffix == ".gguf" or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):
        raise UpcycleError(f"{model} does not exist: give a folder, a .gguf file or a hub id")
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
    tensors = read_headers(folder)
    source = DenseSource(label, folder, config, arch, tensors, revision, temporary)
    return _verify(source)


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
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
    except CONFIG_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UpcycleError(f"{path} is not a config that transformers reads: {reason}") from error
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UpcycleError(f"{path} is not JSON: {error}") from error
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
                tensors[name] = TensorInfo(file, tuple(part.get_shape()), dtype)
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
    for file in files:
        if Path(file).name != file or file in (".", ".."):
            raise UpcycleError(f"{index} names {file!r}, which is outside its folder")
        if not (folder / file).is_file():
            raise UpcycleError(f"{index} names {file}, which is not in {folder}")
    return files


def _verify(source: DenseSource) -> DenseSource:
    """The source without tensors that no forward pass reads, once the rest is what the
    architecture expects."""
    expected = {name: tuple(t.shape) for name, t in skeleton(source.config).state_dict().items()}
    if source.arch.tied:
        expected.pop("lm_head.weight", None)
    dropped = {n for n in source.tensors if n.endswith("rotary_emb.inv_freq")}
    if source.arch.tied:
        dropped.add("lm_head.weight")
    # Sorted: how the source is sharded must not show in the output.
    kept = {name: source.tensors[name] for name in sorted(source.tensors.keys() - dropped)}
    for name in sorted(expected.keys() - kept.keys()):
        raise UpcycleError(f"{source.folder} lacks the tensor {name}, which config.json asks for")
    for name in sorted(kept.keys() - expected.keys()):
        raise UpcycleError(
            f"{kept[name].file} in {source.folder} holds {name}, which {source.arch.family} "
            "does not have: it would be lost"
        )
    for name, info in kept.items():
        if info.shape != expected[name]:
            raise UpcycleError(
                f"{name} in {info.file} has shape {list(info.shape)}, but config.json asks for "
                f"{list(expected[name])}"
            )
    return DenseSource(
        source.label,
        source.folder,
        source.config,
        source.arch,
        kept,
        source.revision,
        source.temporary,
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
    """A GGUF file, dequantised by transformers to float32 in a temporary folder."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UpcycleError(f"{label}: reading GGUF needs `pip install gguf`") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    temporary = tempfile.TemporaryDirectory(prefix="upcycle-gguf-")
    place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        with redirect_stderr(io.StringIO()):  # its bars
            config = AutoConfig.from_pretrained(**place)
            describe(config)
            model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
            config.save_pretrained(temporary.name)
            tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
            state = {k: v.contiguous() for k, v in model.state_dict().items() if k not in tied}
            save_file(state, Path(temporary.name) / SINGLE, metadata={"format": "pt"})
            AutoTokenizer.from_pretrained(**place).save_pretrained(temporary.name)
            write_gguf_card(path, Path(temporary.name))
    except UpcycleError:
        raise
    except Exception as error:  # readers of corrupt files raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UpcycleError(
            f"{label} is not a GGUF file that transformers reads: {reason}"
        ) from error
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


def companions(folder: Path) -> Iterator[Path]:
    """Files that travel with a checkpoint as they are: tokenizer, generation config, licence.

    Raises:
        UpcycleError: as `own_file`.
    """
    patterns = (
        "tokenizer*", "*.model", "*.tiktoken", "vocab.*", "merges.txt", "special_tokens_map.json",
        "added_tokens.json", "chat_template*", "additional_chat_templates/*.jinja",
        "generation_config.json", "LICENSE*",
    )  # fmt: skip
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    yield from (own_file(path, folder) for path in sorted(found))
