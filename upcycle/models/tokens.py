"""Tokens: the one way from documents to what a model reads.

Whatever reads text does so in windows of one form: what the tokenizer puts in front of a text (the
beginning-of-sequence token, if it puts one), then documents, each followed by one end-of-sequence
token, cut without padding. So calibration, check, evaluation and training see the model as it is
used: one that learnt with a token in front knows little without it.
"""

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import blaming
from upcycle.models.chat import ChatRefused, render_chat
from upcycle.models.rows import Document, Exchange, Message, Part
from upcycle.models.text import documents, parse

SPREAD = 8
"""Windows are taken evenly from all of a file, else from so many times as much text: what a layer
does differs more between topics than between tokens, so a few long documents would say little about
the others."""
LENGTH_OF_TOKEN = 8  # characters, more than most
CUT_TOKENS = 64  # before a cut through a text, may be others than those of the whole
LONGEST_WORD = 512  # characters in which a cut looks for white space
SAMPLE, SAMPLED = 4096, 64
"""Characters of a document, and documents, by which the tokens of a text are guessed."""


@dataclass(frozen=True)
class Drawn:
    """Tokens of a text, in its order: windows from all over it, or all that it holds."""

    ids: Tensor
    """[windows x their length], or fewer."""
    total: int | None
    """How many tokens the text holds, if it was read whole."""
    characters: int | None = None
    """How many characters it holds, if it was read in places."""


@dataclass(frozen=True)
class Reader:
    """A model's tokenizer, as it is applied to documents and windows."""

    folder: Path
    tokenizer: Any
    vocab_size: int
    front: tuple[int, ...]
    """What the tokenizer puts before a text: the beginning-of-sequence token, or nothing."""
    back: tuple[int, ...] = ()
    """What it puts after one, of an encoder, which sees it from every token; a decoder does not
    know yet where a window ends."""

    def documents(self, text: str, seed: int) -> Iterator[list[int]]:
        """The tokens of each document of a text, one end-of-sequence token last and none in front.
        A very long document comes in parts, of which only the last has an end.

        Args:
            seed: of the order of builtin text.

        Raises:
            UpcycleError: the text can't be read, or holds chats that the model has no form for.
        """
        return (self.ids(document, sys.maxsize) for document in documents(text, seed))

    def first(self, text: str, wanted: int, *, seed: int) -> Tensor:
        """The first `wanted` tokens of a text's documents, or all of them if there are fewer."""
        tokens: list[int] = []
        for document in documents(text, seed):
            tokens += self.ids(document, wanted - len(tokens))
            if len(tokens) >= wanted:
                break
        return torch.tensor(tokens[:wanted], dtype=torch.int64)

    def windows(
        self, text: str, count: int, length: int, *, seed: int, remedy: str | None = None
    ) -> Tensor:
        """Windows [count, length] from all over a text, in order.

        Args:
            text: the name of one that has documents; see `text.py`.
            remedy: what the error about too little text proposes; by default fewer `tokens`, or
                where they are one window, a shorter one.

        Raises:
            UpcycleError: the text can't be read, or holds too few tokens.
        """
        remedy = remedy or ("(`tokens`)" if count > 1 else "(`seq_len`)")
        return self.begun(self.bodies(text, count, self.body(length), seed=seed, remedy=remedy))

    def body(self, length: int) -> int:
        """How many tokens of text there are in a window of a length."""
        return length - len(self.front) - len(self.back)

    def begun(self, bodies_BT: Tensor) -> Tensor:
        """Whole windows of what they hold: with what begins and ends each around it."""
        front_BF, back_BF = (
            torch.tensor(ids, dtype=torch.int64).expand(len(bodies_BT), -1)
            for ids in (self.front, self.back)
        )
        return torch.cat([front_BF, bodies_BT, back_BF], 1)

    def bodies(self, text: str, count: int, length: int, *, seed: int, remedy: str) -> Tensor:
        """`windows` without what begins each, [count, length]."""
        ids, wanted = self.drawn(text, count, length, seed=seed).ids, count * length
        if len(ids) < wanted:
            raise UpcycleError(
                f"text {text!r} holds {len(ids):,} tokens, but {wanted:,} are needed {remedy}"
            )
        return ids.view(-1, length)

    def drawn(
        self, text: str, count: int, length: int, *, seed: int, spread: int = SPREAD
    ) -> Drawn:
        """So many bodies from all over a text, the last of them from its end; all of a text that
        holds less.

        Args:
            spread: how many times as many tokens may be read of what is not read in places.
        """
        wanted, most = count * length, spread * count * length
        local = parse(text).local
        if local:
            characters, most = sum(map(_length, documents(text, seed))), sys.maxsize
            if characters > spread * LENGTH_OF_TOKEN * wanted:
                found = self._spaced(text, characters, count, length, seed)
                if all(len(body) == length for body in found):
                    return Drawn(torch.tensor(found).flatten(), None, characters)
        ids = self.first(text, most, seed=seed)
        total = len(ids) if local or len(ids) < most else None
        if len(ids) < wanted:
            return Drawn(ids, total)
        ids_BT = _rows(ids, length)
        return Drawn(ids_BT[_spread(len(ids_BT), count)].flatten(), total)

    def held_back(self, text: str, fitted: int, count: int, length: int, *, seed: int) -> Tensor:
        """Bodies from all over a text that `drawn` does not give if it is asked for so many fitted
        ones: at most `count`, [count, length], none of a text that holds no more."""
        drawn = self.drawn(text, fitted or count, length, seed=seed)
        if not fitted:
            return _rows(drawn.ids, length)
        if drawn.characters is not None:
            # Halfway between two fitted ones: they are many times their length apart.
            spaced = self._spaced(text, drawn.characters, fitted, length, seed, shift=0.5)
            whole = [body for body in spaced if len(body) == length]
            left_BT = torch.tensor(whole, dtype=torch.int64).view(-1, length)
        else:
            most = sys.maxsize if parse(text).local else SPREAD * fitted * length
            all_BT = _rows(self.first(text, most, seed=seed), length)
            left_B = torch.ones(len(all_BT), dtype=torch.bool)
            left_B[_spread(len(all_BT), fitted) if len(all_BT) > fitted else slice(None)] = False
            left_BT = all_BT[left_B]
        # A text may repeat itself; and a chat is read from its beginning, wherever it is met.
        seen = set(map(tuple, _rows(drawn.ids, length).tolist()))
        new = [place for place, body in enumerate(left_BT.tolist()) if tuple(body) not in seen]
        return left_BT[new][_spread(len(new), min(count, len(new)))]

    def total(self, text: str, drawn: Drawn, *, seed: int) -> int | None:
        """How many tokens a text holds, roughly if it was read in places: by what some documents
        begin with. None: nobody knows."""
        if drawn.characters is None:
            return drawn.total
        pieces = [str(piece)[:SAMPLE] for piece in islice(documents(text, seed), SAMPLED)]
        tokens = sum(len(self._ids(piece)) for piece in pieces)
        return round(drawn.characters * tokens / max(1, sum(map(len, pieces))))

    def _spaced(
        self, text: str, characters: int, count: int, length: int, seed: int, shift: float = 0.0
    ) -> list[list[int]]:
        """Tokens that begin at evenly spaced characters of all documents put together, so that no
        more of a long text is tokenised than is wanted.

        Each goes on into the documents that follow. One is short where the text ends, or where a
        token has so many characters that the next begins before it is full.

        Args:
            characters: of the text, as `_length` counts.
            shift: how far after the even places they begin, of the way from one to the next.
        """
        starts = [int((place + shift) * characters) // count for place in range(count)]
        found: list[list[int]] = []
        begin = 0
        for document in documents(text, seed):
            end = begin + _length(document)
            if found and len(found[-1]) < length:
                found[-1] += self.ids(document, length)
            while len(found) < count and starts[len(found)] < end:
                found.append(self.ids(document, length, starts[len(found)] - begin))
            begin = end
        return [body[:length] for body in found]

    def ids(self, document: Document, wanted: int, start: int = 0) -> list[int]:
        """A document's tokens and the end of sequence, of a long one no more than are wanted. What
        the tokenizer or the template of a chat puts around it is taken off: windows bring it.

        Args:
            start: the character from which on, or the white space after it; a chat always is whole.

        Raises:
            UpcycleError: it is a chat and there is no template that takes it, or a token is
                outside the model's vocabulary.
        """
        more = wanted + len(self.front) + 1  # than are wanted tell a part from a whole
        if isinstance(document, str):
            ids = self._first_ids(document, more, start)
        elif (chat := self.rendered(document)) is not None:
            ids = self._ids(chat, add_special_tokens=False)
        else:
            ids = self._first_ids("\n\n".join(_words(turn) for turn in document), more)
        while self.front and tuple(ids[: len(self.front)]) == self.front:
            ids = ids[len(self.front) :]
        while self.back and tuple(ids[-len(self.back) :]) == self.back:
            ids = ids[: -len(self.back)]
        ids = (ids if isinstance(document, Part) else self._ended(ids))[:wanted]
        self.check(ids)
        return ids

    def rendered(self, chat: list[Message]) -> str | None:
        """A chat in the form that the model knows, with nothing after its end of sequence; None
        where there is no such form and plain text can stand for it."""
        tokenizer, reason = self.tokenizer, None
        if tokenizer.chat_template is not None:
            try:
                text = render_chat(tokenizer, list(chat))
            except ChatRefused as error:
                reason = error
            else:
                bare = text.rstrip()
                return bare if tokenizer.eos_token and bare.endswith(tokenizer.eos_token) else text
        if isinstance(chat, Exchange):
            return None
        if reason is None:
            raise UpcycleError(
                f'the text holds chats ("messages"), but the tokenizer in {self.folder} has no '
                'chat template: give "text", or a model with a template'
            )
        raise UpcycleError(
            f"the chat template in {self.folder} refuses the messages {str(chat)[:80]}: {reason}"
        ) from reason

    def _ended(self, ids: list[int]) -> list[int]:
        """With one end of sequence, if the tokenizer has one: templates bring theirs."""
        end = self.tokenizer.eos_token_id
        if end is None:
            return ids
        while ids and ids[-1] == end:
            ids = ids[:-1]
        return [*ids, end] if ids else []

    def _first_ids(self, text: str, wanted: int, start: int = 0) -> list[int]:
        """Tokens of so much of a text as holds those that are wanted: it may be long."""
        inside = start > 0 or isinstance(text, Part)
        settings = {"add_special_tokens": False} if inside else {}
        if start:
            start = _word_start(text, start)
        length = LENGTH_OF_TOKEN * wanted
        while len(text) > start + length:
            ids = self._ids(text[start : start + length], **settings)
            if len(ids) >= wanted + CUT_TOKENS:
                return ids[:wanted]
            length *= 2
        return self._ids(text[start:], **settings)

    def _ids(self, text: str, **settings: bool) -> list[int]:
        """Half of a surrogate pair, as JSON that was cut inside an emoji holds, becomes a "?"."""
        text = text.encode(errors="replace").decode()
        with blaming(f"the tokenizer in {self.folder} does not work"):
            return list(self.tokenizer(text, verbose=False, **settings)["input_ids"])

    def check(self, ids: list[int]) -> None:
        """Raise unless all tokens are in the model's vocabulary.

        Raises:
            UpcycleError: the tokenizer is another model's.
        """
        highest = max((*self.front, *ids, *self.back), default=0)
        if highest >= self.vocab_size:
            raise UpcycleError(
                f"the tokenizer in {self.folder} makes token {highest}, but vocab_size is "
                f"{self.vocab_size}: it belongs to another model"
            )


def open_reader(folder: Path, vocab_size: int, *, encoder: bool = False) -> Reader:
    """The reader of the model in a folder.

    Args:
        encoder: whether its tokens see those after them, and so what ends a window.

    Raises:
        UpcycleError: it has no tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    front, back = front_tokens(tokenizer), _added(tokenizer, -1)[::-1] if encoder else ()
    return Reader(folder, tokenizer, vocab_size, front, back)


def front_tokens(tokenizer: Any) -> tuple[int, ...]:
    """What a tokenizer puts before a text."""
    return _added(tokenizer, 1)


def _added(tokenizer: Any, step: int) -> tuple[int, ...]:
    """What it puts around one, from the first token on, or with a step of -1 from the last."""
    with blaming(f"the tokenizer in {tokenizer.name_or_path} does not work"):
        found = tokenizer("a", return_special_tokens_mask=True)
    tokens = list(zip(found["input_ids"], found["special_tokens_mask"], strict=True))
    return tuple(token for token, _ in takewhile(lambda token: token[1], tokens[::step]))


def _rows(ids: Tensor, length: int) -> Tensor:
    """Tokens as whole bodies [B, length]; what is left at the end is dropped."""
    return ids[: len(ids) // length * length].view(-1, length)


def _spread(rows: int, count: int) -> Tensor:
    """So many places, evenly spread over all."""
    return torch.linspace(0, rows - 1, count).round().long()


def _word_start(text: str, start: int) -> int:
    """The white space after a place, where a word ends; the place itself, where there is none."""
    space = re.compile(r"\s").search(text, start, start + LONGEST_WORD)
    if space is not None:
        return space.start()
    # The part that follows begins with the white space.
    return len(text) if isinstance(text, Part) and len(text) < start + LONGEST_WORD else start


def _words(turn: Message) -> str:
    return str(turn.get("content", ""))


def _length(document: Document) -> int:
    """Characters, of a chat roughly."""
    return len(document if isinstance(document, str) else str(document))


def load_tokenizer(folder: Path, *, instead: str = "") -> Any:
    """The tokenizer in a model's folder.

    Args:
        instead: what the error proposes besides tokenizer files.

    Raises:
        UpcycleError: there is none, it can't be read, or it needs a library that is not here.
    """
    from transformers import AutoTokenizer

    try:
        with blaming(
            f"{folder} holds no tokenizer that transformers reads, so no text can be tokenised "
            f"(add the model's tokenizer files{instead})"
        ):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            # Without any file, transformers makes an empty one of some classes.
            if len(tokenizer) <= len(tokenizer.get_added_vocab()):
                raise ValueError("it has no vocabulary")
            return tokenizer
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
