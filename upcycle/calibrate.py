"""Calibration text: from words to packed token sequences."""

import hashlib
import json
import pydoc_data.topics
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.errors import UpcycleError
from upcycle.paths import local_path
from upcycle.source import DenseSource, companions

Document = str | list[dict[str, Any]]
"""Text, or the messages of a chat."""
SUFFIXES = (".txt", ".raw", ".md", ".jsonl", ".parquet")
SPREAD = 8
"""Sequences are taken evenly from all of a file, else from so many times as much text: what a layer
does differs more between topics than between tokens, so a few long documents would say little about
the others."""
WRITTEN_LENGTH = 128  # tokens of a document that the model writes itself
WRITTEN_TOGETHER = 128  # such documents at a time
LENGTH_OF_TOKEN = 8  # characters, more than most
CUT_TOKENS = 64  # before a cut through a text, may be others than those of the whole
LONGEST_WORD = 512  # characters in which a cut looks for white space
MODULE_MOST = 8000
"""Characters of one module of `builtin`: its code then weighs about as much as its prose."""
BUILTIN_MODULES = """
    argparse ast bisect calendar collections/__init__ configparser contextlib copy csv dataclasses
    datetime difflib email/message enum fractions functools heapq html/parser http/client inspect
    ipaddress json/decoder logging/__init__ mailbox numbers optparse pathlib pdb pickle platform
    pprint queue random sched shlex shutil smtplib socketserver statistics string subprocess
    tarfile tempfile textwrap threading tokenize traceback typing unittest/mock urllib/request
    uuid wave weakref xml/dom/minidom zipfile
""".split()


def calibration_tokens(
    source: DenseSource, text: str, sequences: int, seq_len: int, seed: int
) -> Tensor:
    """Packed tokens [sequences, seq_len] of the named calibration text.

    Documents are joined by the end-of-sequence token and cut without padding; sequences are taken
    evenly from all over a file, or the first part of any other text, in order. Of several texts,
    each gives the same number of sequences (give or take one), in turn.

    Args:
        text: `builtin`, `self`, a file (.txt, .jsonl, .parquet) or `hf:DATASET[:split[:column]]`;
            or several of these, joined by +.

    Raises:
        UpcycleError: a text can't be read, or holds too few tokens.
    """
    names = texts(text)[:sequences]
    tokens_BL = torch.empty(sequences, seq_len, dtype=torch.int64)
    for place, name in enumerate(names):
        mine_BL = tokens_BL[place :: len(names)]
        if name == "self":
            tokenizer = load_tokenizer(source.folder)
            mine_BL[:] = _written_by_model(source, tokenizer, len(mine_BL), seq_len, seed)
        else:
            mine_BL[:] = packed_tokens(
                source.folder,
                source.config.vocab_size,
                name,
                len(mine_BL),
                seq_len,
                seed=seed,
                remedy="(check included): lower --calibration-tokens, or give more text",
            )
    return tokens_BL


def texts(text: str) -> list[str]:
    """The texts that are joined by +, unless a file has that name."""
    if "+" not in text or local_path(text).is_file():
        return [text]
    return text.split("+")


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
        text: as in `calibration_tokens`, except `self`.
        remedy: what the error about too little text proposes, besides more text.

    Raises:
        UpcycleError: as there.
    """
    wanted, most = sequences * seq_len, SPREAD * sequences * seq_len
    if local_path(text).is_file():
        length, most = sum(map(_length, _documents(text, seed))), sys.maxsize
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
    for document in _documents(text, seed):
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
    for document in _documents(text, seed):
        ids = _token_ids(tokenizer, document, folder, wanted - len(tokens))
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
    tokenizer: Any, document: Document, folder: Path, wanted: int, start: int = 0
) -> list[int]:
    """The tokens of a document, of a long one perhaps no more than are wanted. A chat is rendered
    by the tokenizer's own template, which brings its special tokens.

    Args:
        start: the character from which on, or the white space after it; a chat always is whole.
    """
    if isinstance(document, str):
        return _first_ids(tokenizer, document, wanted, start)
    if tokenizer.chat_template is None:
        raise UpcycleError(
            f'the text holds chats ("messages"), but the tokenizer in {folder} has no chat '
            'template: give "text", or a model with a template'
        )
    try:
        rendered = tokenizer.apply_chat_template(document, tokenize=False)
    except (TemplateError, KeyError, TypeError, ValueError) as error:
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
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises nothing narrower for a corrupt tokenizer.json
        raise UpcycleError(
            f"{folder} holds no tokenizer that transformers reads, so no text can be "
            "tokenised: add the model's tokenizer files, or pass --calibration none"
        ) from error


def check_text(text: str, flag: str = "--calibration") -> None:
    """Raise the errors about a text that can be known without reading it.

    `self` and `none` are calibration texts only.
    """
    names = ["builtin", "self", "none"] if flag == "--calibration" else ["builtin"]
    if text in names:
        return
    if text.startswith("hf:"):
        if not text.removeprefix("hf:").split(":")[0]:
            raise UpcycleError(f"{flag} {text!r} names no dataset: hf:DATASET")
        return
    path = local_path(text)
    if not path.is_file():
        raise UpcycleError(
            f"{flag} {text!r} is not a file: give {', '.join(names)}, "
            "hf:DATASET[:split[:column]] or a .txt, .jsonl or .parquet file"
        )
    if path.suffix not in SUFFIXES:
        raise UpcycleError(
            f"{flag} {text!r} ends in {path.suffix!r}: known are {', '.join(SUFFIXES)}"
        )


def _documents(text: str, seed: int) -> Iterator[Document]:
    if text == "builtin":
        return _builtin(seed)
    if text.startswith("hf:"):
        return _hub_dataset(text.removeprefix("hf:"))
    path = local_path(text)
    if path.suffix == ".jsonl":
        return _jsonl(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    return iter([_read_text(path)])


def _builtin(seed: int) -> Iterator[str]:
    """Python's own documentation and standard-library source, evenly mixed: prose and code that
    every installation holds."""
    shuffle = random.Random(seed).shuffle
    prose = [pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics)]
    code = list(_standard_library())
    shuffle(prose)
    shuffle(code)
    places = [(i / len(kind), text) for kind in (prose, code) for i, text in enumerate(kind)]
    yield from (text for _, text in sorted(places))


def _standard_library() -> Iterator[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [folder / f"{name}.py" for name in BUILTIN_MODULES]
    modules = (path.read_text(encoding="utf-8") for path in paths if path.is_file())
    yield from (module[:MODULE_MOST] for module in modules)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows begins a file with a mark
    except UnicodeDecodeError as error:
        raise UpcycleError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


def _jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UpcycleError(f"{path}, line {number}, is not JSON: {error}") from error
        row = row if isinstance(row, dict) else {}
        if isinstance(row.get("text"), str):
            yield row["text"]
        elif _is_chat(row.get("messages")):
            yield row["messages"]
        else:
            raise UpcycleError(
                f'{path}, line {number}, has neither a "text" string nor a "messages" list'
            )


def _is_chat(messages: Any) -> bool:
    """A template would render anything else as nothing."""
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(isinstance(message, dict) for message in messages)
    )


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UpcycleError(f"{path} needs `pip install upcycle[datasets]`") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UpcycleError(f"{path} is not a parquet file: {error}") from error
    if "text" not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise UpcycleError(f'{path} has no column "text" (it has {names})')
    kind = file.schema_arrow.field("text").type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UpcycleError(f'{path}: column "text" holds {kind}, not strings')
    for batch in file.iter_batches(columns=["text"]):
        yield from (text for text in batch.column(0).to_pylist() if text)


def _hub_dataset(name: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise UpcycleError(f"hf:{name} needs `pip install upcycle[datasets]`") from error
    dataset, split, column = [*name.split(":"), "", ""][:3]
    split, column = split or "train", column or "text"
    try:
        for row in datasets.load_dataset(dataset, split=split, streaming=True):
            if column not in row:
                raise UpcycleError(
                    f"hf:{dataset} has no column {column!r} (it has {', '.join(row)})"
                )
            if not isinstance(row[column], str):
                kind = type(row[column]).__name__
                raise UpcycleError(f"hf:{dataset}: column {column!r} holds {kind}, not strings")
            yield row[column]
    except (ConnectionError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UpcycleError(f"hf:{dataset} can't be loaded: {reason}") from error


def _written_by_model(
    source: DenseSource, tokenizer: Any, sequences: int, seq_len: int, seed: int
) -> Tensor:
    """Text that the model writes itself (this loads the whole model): short documents, each begun
    with a random token of the vocabulary so that they speak of many things (LLM-QAT,
    arXiv:2305.17888)."""
    from transformers import AutoModelForCausalLM

    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    special = set(tokenizer.all_special_ids)
    vocabulary = range(min(len(tokenizer), source.config.vocab_size))
    words = torch.tensor([token for token in vocabulary if token not in special] or [start])
    model = AutoModelForCausalLM.from_pretrained(source.folder)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        batches = []
        for count in _batch_sizes(-(-sequences * seq_len // WRITTEN_LENGTH), WRITTEN_TOGETHER):
            first = words[torch.randint(len(words), (count, 1))]
            prompt = torch.cat([torch.full((count, 1), start), first], dim=1)
            written = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=WRITTEN_LENGTH - 2,
                min_new_tokens=WRITTEN_LENGTH - 2,
                pad_token_id=start,
            )
            batches.append(written.flatten())
    return torch.cat(batches)[: sequences * seq_len].view(sequences, seq_len)


def _batch_sizes(total: int, size: int) -> list[int]:
    return [min(size, total - done) for done in range(0, total, size)]
