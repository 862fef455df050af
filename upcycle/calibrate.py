"""Calibration text: from words to packed token sequences."""

import hashlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.chat import ChatRefused, render_chat
from upcycle.errors import UpcycleError
from upcycle.foreign import blaming
from upcycle.paths import local_path
from upcycle.source import DenseSource, companions
from upcycle.text import OURS, PROBES, Document, documents, texts
from upcycle.writer import Progress, written_tokens

SPREAD = 8
"""Sequences are taken evenly from all of a file, else from so many times as much text: what a layer
does differs more between topics than between tokens, so a few long documents would say little about
the others."""
LENGTH_OF_TOKEN = 8  # characters, more than most
CUT_TOKENS = 64  # before a cut through a text, may be others than those of the whole
LONGEST_WORD = 512  # characters in which a cut looks for white space
CHECK_WINDOW = 512
"""Tokens of a window on which the check measures, at most: built-in probes are short."""


@dataclass(frozen=True)
class Calibration:
    """What a conversion is fitted on, and what its check measures it on."""

    fit_BL: Tensor
    held: Mapping[str, Tensor]
    """By the kind of text, windows [W, L] that nothing is fitted on."""


def calibration(
    source: DenseSource,
    text: str,
    *,
    sequences: int,
    windows: int,
    seq_len: int,
    seed: int,
    device: torch.device,
    progress: Progress = lambda stage, done, total: None,
) -> Calibration:
    """Packed tokens to fit on, [sequences, seq_len], and windows to check on.

    Documents are joined by the end-of-sequence token and cut without padding; sequences are taken
    evenly from all over a file, or the first part of any other text, in order. Of several texts,
    each gives the same number of sequences (give or take one), in turn. Each text's last sequences
    are held back, but of the builtin text, which has probes in their place: those of every kind,
    whatever the calibration text.

    Args:
        text: the name of a text, or several joined by +; see `text.py`.
        windows: to hold back of each kind, at most.

    Raises:
        UpcycleError: a text can't be read, or holds too few tokens.
    """
    window = min(seq_len, CHECK_WINDOW)
    names = [name for name in texts(text) if name != "none"]
    names = names[: max(1, sequences)]
    fit_BL = torch.empty(sequences, seq_len, dtype=torch.int64)
    held: dict[str, Tensor] = {}
    # What the model writes comes last: it takes longest, and another text may be at fault.
    for place in sorted(range(len(names)), key=lambda place: names[place] == "self"):
        name, mine_BL = names[place], fit_BL[place :: len(names)]
        back = 0 if name == "builtin" else -(-windows * window // seq_len)
        if not len(mine_BL) + back:
            continue
        if name == "self":
            wanted = (len(mine_BL) + back) * seq_len
            tokenizer = load_tokenizer(source.folder)
            ids = written_tokens(source, tokenizer, wanted, seed, device, progress)
            all_BL = ids[:wanted].view(-1, seq_len)
        else:
            all_BL = _from_all_over(source, name, len(mine_BL) + back, seq_len, seed)
        mine_BL[:] = all_BL[: len(mine_BL)]
        if back:
            held[name] = all_BL[len(mine_BL) :].flatten()[: windows * window].view(-1, window)
    if windows:
        held |= probes(source, windows, window)
    return Calibration(fit_BL, held)


def _from_all_over(
    source: DenseSource, name: str, sequences: int, seq_len: int, seed: int
) -> Tensor:
    return packed_tokens(
        source.folder,
        source.config.vocab_size,
        name,
        sequences,
        seq_len,
        seed=seed,
        remedy="(check included): lower --calibration-tokens, or give more text",
    )


def probes(source: DenseSource, windows: int, window: int) -> dict[str, Tensor]:
    """At most so many windows of each kind of built-in text that nothing is fitted on."""
    found = {}
    for name in PROBES:
        ids = first_tokens(source.folder, source.config.vocab_size, name, windows * window, seed=0)
        length = min(window, len(ids))
        found[name] = ids[: len(ids) // length * length].view(-1, length)
    return found


def check_seq_len(seq_len: int, config: PreTrainedConfig) -> None:
    """Raise what is known of the sequences' length before any is read.

    Raises:
        UpcycleError: it is more than the model was made for. (Dynamic rotary embedding is made for
            more than it says.)
    """
    # Not every architecture has them, and `eval` takes any.
    rope = getattr(config, "rope_parameters", None) or {}
    positions = getattr(config, "max_position_embeddings", None) or seq_len
    if seq_len > positions and rope.get("rope_type") != "dynamic":
        raise UpcycleError(
            f"--seq-len {seq_len} is more than the model's {positions} positions "
            f"(max_position_embeddings): give --seq-len {positions}"
        )


def packed_tokens(
    folder: Path,
    vocab_size: int,
    text: str,
    sequences: int,
    seq_len: int,
    *,
    seed: int = 0,
    remedy: str = "(--tokens)",
) -> Tensor:
    """Tokens [sequences, seq_len] from all over a text, by the tokenizer in a model's folder.

    Args:
        text: as in `calibration`, but one, and not `self`.
        remedy: what the error about too little text proposes, besides more text.

    Raises:
        UpcycleError: as there.
    """
    wanted, most = sequences * seq_len, SPREAD * sequences * seq_len
    if local_path(text).is_file():
        length, most = sum(map(_length, documents(text, seed))), sys.maxsize
        if length > SPREAD * LENGTH_OF_TOKEN * wanted:
            found = _spaced_windows(folder, text, length, sequences, seq_len, seed)
            if all(len(window) == seq_len for window in found):
                return _token_tensor(found, folder, vocab_size)
    ids = first_tokens(folder, vocab_size, text, most, seed=seed)
    if len(ids) < wanted:
        raise UpcycleError(
            f"text {text!r} holds {len(ids):,} tokens, but {wanted:,} are needed {remedy}"
        )
    ids_BL = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    return ids_BL[torch.linspace(0, len(ids_BL) - 1, sequences).round().long()]


def _spaced_windows(
    folder: Path, text: str, length: int, sequences: int, seq_len: int, seed: int
) -> list[list[int]]:
    """Windows of tokens that begin at evenly spaced characters of all documents put together, so
    that no more of a long text is tokenised than is wanted.

    Each goes on into the documents that follow. One is short where the text ends, or where a token
    has so many characters that the next window begins before it is full.

    Args:
        length: of the text, as `_length` counts.
    """
    tokenizer = load_tokenizer(folder)
    starts = [place * length // sequences for place in range(sequences)]
    windows: list[list[int]] = []
    begin = 0
    for document in documents(text, seed):
        end = begin + _length(document)
        if windows and len(windows[-1]) < seq_len:
            windows[-1] += _ended(tokenizer, _token_ids(tokenizer, document, folder, seq_len))
        while len(windows) < sequences and starts[len(windows)] < end:
            start = starts[len(windows)] - begin
            ids = _token_ids(tokenizer, document, folder, seq_len, start)
            windows.append(_ended(tokenizer, ids))
        begin = end
    return [window[:seq_len] for window in windows]


def _length(document: Document) -> int:
    """Characters, of a chat roughly."""
    return len(document if isinstance(document, str) else str(document))


def first_tokens(folder: Path, vocab_size: int, text: str, wanted: int, *, seed: int) -> Tensor:
    """The first `wanted` tokens of a text's documents, or all of them if there are fewer; each
    document is followed by the end-of-sequence token."""
    tokenizer = load_tokenizer(folder)
    tokens: list[int] = []
    for document in documents(text, seed):
        ids = _token_ids(tokenizer, document, folder, wanted - len(tokens), ours=text in OURS)
        tokens += _ended(tokenizer, ids)
        if len(tokens) >= wanted:
            break
    return _token_tensor(tokens[:wanted], folder, vocab_size)


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """A document's tokens and the end of sequence, if the tokenizer has one."""
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def _token_tensor(tokens: list[int] | list[list[int]], folder: Path, vocab_size: int) -> Tensor:
    ids = torch.tensor(tokens, dtype=torch.int64)
    if ids.numel() and int(ids.max()) >= vocab_size:
        raise UpcycleError(
            f"the tokenizer in {folder} makes token {int(ids.max())}, but vocab_size is "
            f"{vocab_size}: it belongs to another model"
        )
    return ids


def _token_ids(
    tokenizer: Any,
    document: Document,
    folder: Path,
    wanted: int,
    start: int = 0,
    *,
    ours: bool = False,
) -> list[int]:
    """The tokens of a document, of a long one perhaps no more than are wanted. A chat is rendered
    by the tokenizer's own template, which brings its special tokens; one of ours, where there is
    none that takes it, as plain text.

    Args:
        start: the character from which on, or the white space after it; a chat always is whole.
    """
    if isinstance(document, str):
        return _first_ids(tokenizer, document, wanted, start)
    plain = "\n\n".join(str(turn.get("content", "")) for turn in document)
    if tokenizer.chat_template is None:
        if ours:
            return _ids_of(tokenizer, plain)
        raise UpcycleError(
            f'the text holds chats ("messages"), but the tokenizer in {folder} has no chat '
            'template: give "text", or a model with a template'
        )
    try:
        rendered = render_chat(tokenizer, document)
    except ChatRefused as error:
        if ours:
            return _ids_of(tokenizer, plain)
        raise UpcycleError(
            f"the chat template in {folder} refuses the messages {str(document)[:80]}: {error}"
        ) from error
    return _ids_of(tokenizer, rendered, add_special_tokens=False)


def _first_ids(tokenizer: Any, text: str, wanted: int, start: int = 0) -> list[int]:
    """Tokens of so much of a text as holds those that are wanted: it may be gigabytes."""
    settings = {}
    if start:  # inside the text, where nothing begins a document
        settings = {"add_special_tokens": False}
        space = re.compile(r"\s").search(text, start, start + LONGEST_WORD)
        start = start if space is None else space.start()
    length = LENGTH_OF_TOKEN * wanted
    while len(text) > start + length:
        ids = _ids_of(tokenizer, text[start : start + length], **settings)
        if len(ids) >= wanted + CUT_TOKENS:
            return ids[:wanted]
        length *= 2
    return _ids_of(tokenizer, text[start:], **settings)


def _ids_of(tokenizer: Any, text: str, **settings: bool) -> list[int]:
    """Half of a surrogate pair, as JSON that was cut inside an emoji holds, becomes a "?"."""
    text = text.encode(errors="replace").decode()
    with blaming(f"the tokenizer in {tokenizer.name_or_path} does not work"):
        return list(tokenizer(text, verbose=False, **settings)["input_ids"])


def text_fingerprint(folder: Path, text: str) -> list[str]:
    """SHA-256 of what tokens are made from, where it lies here: the text's files, and those that
    travel with the model, its tokenizer's among them."""
    named = (local_path(name) for name in texts(text))
    files = [*companions(folder), *(path for path in named if path.is_file())]
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        UpcycleError: there is none, it can't be read, or it needs a library that is not here.
    """
    from transformers import AutoTokenizer

    try:
        with blaming(
            f"{folder} holds no tokenizer that transformers reads, so no text can be tokenised "
            "(add the model's tokenizer files, or pass --calibration none)"
        ):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except UpcycleError:
        for pattern, libraries in LIBRARIES.items():
            _check_libraries(folder, pattern, libraries)
        raise


LIBRARIES = {"*.model": ("sentencepiece", "google.protobuf"), "*.tiktoken": ("tiktoken",)}
"""What reads a tokenizer of which there is no tokenizer.json. Of a missing one transformers says
something else, if anything."""


def _check_libraries(folder: Path, pattern: str, libraries: tuple[str, ...]) -> None:
    files = sorted(folder.glob(pattern))
    missing = [name for name in libraries if not _is_installed(name)]
    if files and missing and not (folder / "tokenizer.json").is_file():
        names = " and ".join(missing).replace("google.", "")
        raise UpcycleError(
            f"{files[0]} is a tokenizer that is read by {names}: `pip install "
            "upcycle[sentencepiece]`"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a module's package
        return False
