"""Training text: packed sequences from all over it, its end held out."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.paths import public_name
from upcycle.core.rng import generator
from upcycle.finetune.assistant import chat_stream
from upcycle.finetune.settings import SHORTEST
from upcycle.models.record.training import Used
from upcycle.models.text import documents, parse, texts, weighted
from upcycle.models.tokens import Drawn, Reader, open_reader

SPREAD = 2
"""Less than calibration's: there is much more to train on."""


@dataclass(frozen=True)
class Data:
    """Token ids, which of them are text, the rest being padding, and which of these are to be
    learnt; [sequences, seq_len] each."""

    tokens_BL: Tensor
    mask_BL: Tensor
    scored_BL: Tensor
    text_B: Tensor
    """Which of the texts each sequence is of."""
    place_B: Tensor
    """Its number among all of the data."""
    used: tuple[Used, ...] = ()
    """Of each text, where this is all of what is trained or validated on."""

    def __len__(self) -> int:
        return len(self.tokens_BL)

    def take(self, rows: Tensor) -> "Data":
        return Data(
            self.tokens_BL[rows],
            self.mask_BL[rows],
            self.scored_BL[rows],
            self.text_B[rows],
            self.place_B[rows],
        )

    @property
    def foretelling_BL(self) -> Tensor:
        """Tokens after which one comes that is to be learnt, as far as the sequence tells."""
        last_B1 = self.scored_BL[:, -1:]
        return self.mask_BL & torch.cat([self.scored_BL[:, 1:], last_B1], dim=1)

    @property
    def scored(self) -> int:
        """Tokens that are to be learnt; of a sequence's first none can be foretold."""
        return int(self.scored_BL[:, 1:].sum())


def training_data(
    folder: Path,
    vocab_size: int,
    text: str,
    *,
    seq_len: int,
    train_tokens: int,
    validation_tokens: int,
    seed: int,
    assistant_only: bool = False,
) -> tuple[Data, Data]:
    """What to train on, and what to validate on.

    Of several texts joined by +, each gives an equal part, or as `weighted` says. Sequences are
    taken evenly from all over a text, but of a hub dataset the first ones; the last of them
    validate, the others train. A text that holds less than is asked for is used whole, its last
    sequence padded, and at most a tenth of it validates; training then goes over the rest several
    times.

    Args:
        folder: holds the tokenizer.
        text: files, `builtin` or `hf:…`, as for calibration; .jsonl may hold chats ("messages").
        train_tokens, validation_tokens: how many to read at most, of each at least one sequence.
        assistant_only: of chats only the assistant's turns are to be learnt. Sequences that hold
            nothing of them are left out.

    Raises:
        UpcycleError: a text can't be read, or holds less than two sequences.
    """
    named = weighted(text)
    reader, all_weights = open_reader(folder, vocab_size), sum(weight for _, weight in named)
    parts, used = [], []
    for number, (name, weight) in enumerate(named):
        share = weight / all_weights
        wanted = math.ceil(share * (train_tokens + validation_tokens))
        asked = max(2, -(-wanted // seq_len))  # one to train, one to validate, however few
        spread = SPREAD if parse(name).local else 1
        if assistant_only:
            drawn, scored = _chats(reader, name, asked, seq_len, seed)
        else:
            drawn = reader.drawn(name, asked, reader.body(seq_len), seed=seed, spread=spread)
            scored = torch.ones_like(drawn.ids, dtype=torch.bool)
        whole = _pack(name, reader, drawn.ids, scored, seq_len, number)
        rows = len(whole)
        most = rows - 1 if rows == asked else rows // 10
        last = max(1, min(math.floor(share * validation_tokens / seq_len), most))
        train, held = (whole.take(part) for part in torch.arange(rows).split([rows - last, last]))
        parts.append((train, held))
        used.append(_used(name, reader.total(name, drawn, seed=seed), train, held))
    trains, helds = zip(*parts, strict=True)
    return _join(trains, used), _join(helds, used)


def _used(name: str, total: int | None, train: Data, held: Data) -> Used:
    tokens, held_out = (int(data.mask_BL.sum()) for data in (train, held))
    # What was left out of a text, or what a rough count misses, is no more than it holds.
    total = None if total is None else max(total, tokens + held_out)
    return Used(public_name(name), tokens, held_out, total)


def _chats(reader: Reader, name: str, rows: int, seq_len: int, seed: int) -> tuple[Drawn, Tensor]:
    """As `Reader.drawn`, and which of the tokens the assistant wrote."""
    length = reader.body(seq_len)
    most = sys.maxsize if parse(name).local else rows * length
    found = chat_stream(reader, documents(name, seed), most)
    ids, scored = torch.tensor(found[0], dtype=torch.int64), torch.tensor(found[1])
    total = len(ids) if len(ids) < most else None
    if not scored.any():
        raise UpcycleError(
            f"`data={name!r}` holds no words of the assistant: give chats in which it answers, or "
            "drop `assistant_only_loss`"
        )
    whole = len(ids) // length * length
    first = 0 if reader.front else 1  # nothing foretells the first token of a window
    kept = scored[:whole].view(-1, length)[:, first:].any(1).nonzero()[:, 0]
    if len(kept) < 2:
        raise UpcycleError(
            f"`data={name!r}` holds {len(kept)} sequences of {seq_len} with words of the "
            "assistant, but two are the least to train and validate on: lower `seq_len`, or give "
            "more chats"
        )
    if len(kept) > rows:
        kept = kept[torch.linspace(0, len(kept) - 1, rows).round().long()]
    ids_BT, scored_BT = ids[:whole].view(-1, length), scored[:whole].view(-1, length)
    return Drawn(ids_BT[kept].flatten(), total), scored_BT[kept].flatten()


def _pack(
    name: str,
    reader: Reader,
    ids: Tensor,
    scored: Tensor,
    seq_len: int,
    number: int,
) -> Data:
    """Whole sequences of the tokens of a text, and of its end."""
    length = reader.body(seq_len)
    if len(ids) < length + 2:
        enough = len(ids) >= reader.body(SHORTEST) + 2
        raise UpcycleError(
            f"`data={name!r}` holds {len(ids):,} tokens, but two sequences of {seq_len} are the "
            f"least to train and validate on: {'lower `seq_len`, or ' * enough}give more text"
        )
    if not reader.front and len(ids) % length == 1:
        ids = ids[:-1]  # a sequence of one token predicts nothing
    rows = -(-len(ids) // length)
    tokens_BT = torch.zeros(rows * length, dtype=torch.int64)
    tokens_BT[: len(ids)] = ids
    tokens_BL = reader.begun(tokens_BT.view(rows, length))
    padded = rows * length - len(ids)
    mask_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    mask_BL[-1, seq_len - padded :] = False
    scored_BT = torch.zeros(rows * length, dtype=torch.bool)
    scored_BT[: len(ids)] = scored[: len(ids)]
    unscored_BF = mask_BL[:, : len(reader.front)] & False  # what begins every window is not learnt
    scored_BL = torch.cat([unscored_BF, scored_BT.view(rows, length)], 1)
    return _numbered(tokens_BL, mask_BL, scored_BL, number)


def _numbered(tokens_BL: Tensor, mask_BL: Tensor, scored_BL: Tensor, text: int) -> Data:
    rows = len(tokens_BL)
    return Data(tokens_BL, mask_BL, scored_BL, torch.full((rows,), text), torch.arange(rows))


def with_texts(
    held: Data, folder: Path, vocab_size: int, text: str, *, seq_len: int, tokens: int, seed: int
) -> Data:
    """What is validated on, with windows from all over texts that nothing is trained on.

    Args:
        tokens: of all of them together, at least one window each.

    Raises:
        UpcycleError: a text can't be read, or holds too few tokens.
    """
    reader, names = open_reader(folder, vocab_size), texts(text)
    count, parts, used = max(1, tokens // len(names) // seq_len), [held], [*held.used]
    less = "`seq_len`" if count == 1 else setting("validation_tokens")
    remedy = f"of {setting('validate_also', text)}: lower {less}, or give more text"
    for number, name in enumerate(names, len(held.used)):
        tokens_BL = reader.windows(name, count, seq_len, seed=seed, remedy=remedy)
        mask_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
        scored_BL = mask_BL.clone()
        scored_BL[:, : len(reader.front)] = False
        parts.append(_numbered(tokens_BL, mask_BL, scored_BL, number))
        used.append(Used(public_name(name), 0, tokens_BL.numel(), None))
    return _join(parts, used)


def _join(parts: Sequence[Data], used: Sequence[Used]) -> Data:
    return Data(
        torch.cat([p.tokens_BL for p in parts]),
        torch.cat([p.mask_BL for p in parts]),
        torch.cat([p.scored_BL for p in parts]),
        torch.cat([p.text_B for p in parts]),
        torch.arange(sum(map(len, parts))),
        tuple(used),
    )


def batch_rows(sequences: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The rows [batch_size] of one step: every row once per pass over the data, each pass in an
    order of its own. A pure function of the step, so that a resumed run sees the same."""
    first = step * batch_size
    passes = range(first // sequences, (first + batch_size - 1) // sequences + 1)
    order = torch.cat(
        [torch.randperm(sequences, generator=generator(seed, "order", n)) for n in passes]
    )
    start = first - passes.start * sequences
    return order[start : start + batch_size]
