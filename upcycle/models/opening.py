"""From MODEL to a dense source, whose tensors are those that its config asks for."""

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedConfig

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import blamed
from upcycle.core.paths import local_path
from upcycle.models.checkpoint import Checkpoint, locate
from upcycle.models.config import read_config
from upcycle.models.config_fields import check_layers
from upcycle.models.families import FAMILIES, describe
from upcycle.models.holders import HOLDERS
from upcycle.models.layout import Layout, is_headless
from upcycle.models.names import EMBEDDINGS, HEAD, plain_names
from upcycle.models.quantised import LINK
from upcycle.models.shards import TensorInfo
from upcycle.models.source import DenseSource
from upcycle.models.weights import equal_matrices

BUFFER = re.compile(r"rotary_emb\.inv_freq$")  # worked out anew by every forward pass


def open_source(model: str, *, revision: str | None = None) -> DenseSource:
    """The dense checkpoint that MODEL names; reads headers, no weights. Of a hub id
    the weights stay where they are until `DenseSource.fetch`.

    Raises:
        UpcycleError: it is not there, is no model, is corrupt, or is of a family that upcycle
            does not know.
    """
    return open_located(model, locate(model, revision, accept=describe))


def open_located(model: str, found: Checkpoint | None) -> DenseSource:
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
    found = locate(model, None)
    if found is None:
        source = open_located(model, None)  # by a name, so that its folder stays for as long
        yield source.folder
        return
    if found.remote is not None:
        found.remote.fetch()
    yield found.folder


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


def _settle_twins(folder: Path, twins: frozenset[str], tensors: dict[str, TensorInfo]) -> None:
    """Make one tensor of embeddings that are stored several times.

    Raises:
        UpcycleError: they are not the same.
    """
    for name in sorted(twins & tensors.keys()):
        info = tensors.pop(name)
        first = tensors.setdefault(EMBEDDINGS, info)
        if first is not info and not equal_matrices(folder, first, info):
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
    if equal_matrices(folder, tensors[HEAD], tensors[EMBEDDINGS]):
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
        from upcycle.models.gguf.source import prepare
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
