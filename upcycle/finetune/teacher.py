"""The teacher's predictions, stored once: for the text that is validated on, and, where it is to be
neither run nor in memory while the model learns from them, for what is trained on.

T tokens after which one comes that is to be learnt, N words kept of V.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upcycle.core.paths import disk_errors, sync
from upcycle.finetune.data import Data
from upcycle.finetune.losses import Kept, kept_words

HELD_WORDS = 4096
"""Kept of each prediction for held-out text, however few of those for what is trained on: the more
are kept, the nearer is the divergence to that over the whole vocabulary."""

RunTeacher = Callable[[Tensor], Tensor]
"""Logits [B, L, V] of tokens [B, L]."""


def record_type(words: int) -> np.dtype[Any]:
    """What is kept of one token's prediction: the likeliest words, the logarithms of their
    probabilities and of the others' together, and minus that of the word which comes, all in
    nats."""
    fields = [("words", "<i4", words), ("log_probs", "<f4", words)]
    return np.dtype([*fields, ("rest", "<f4"), ("surprise", "<f4")])


@dataclass(frozen=True)
class Store:
    """Predictions for the sequences of some data, in a file."""

    records_T: np.ndarray[Any, Any]
    starts: list[int]
    """Of each sequence's tokens, and their end."""

    def kept(self, rows_B: Tensor, device: torch.device) -> Kept:
        """Of some sequences, one after the other."""
        found = np.concatenate([self._of(row) for row in rows_B.tolist()])
        return Kept(
            torch.from_numpy(found["words"].astype(np.int64)).to(device),
            torch.from_numpy(found["log_probs"].copy()).to(device),
            torch.from_numpy(found["rest"].copy()).to(device),
        )

    def loss(self, row: int, scored: int) -> float:
        """The teacher's mean loss on the tokens of a sequence that count."""
        return float(self._of(row)["surprise"].sum(dtype=np.float64)) / scored

    def _of(self, row: int) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = self.records_T[self.starts[row] : self.starts[row + 1]]
        return found


@dataclass(frozen=True)
class Teacher:
    """What a run has of the dense model that it learns from."""

    held: Store
    """Predictions for what is validated on, at a temperature of 1."""
    train: Store | None
    """Those for what is trained on, where it does not run in every step."""
    model: nn.Module | None
    """It itself, where it does."""
    seconds: float
    """That it took for a sequence of the predictions; 0 if all were there."""


def size(tokens: int, words: int) -> int:
    """Bytes of the predictions for so many tokens."""
    return tokens * record_type(words).itemsize


def is_stored(path: Path, data: Data, words: int) -> bool:
    """Whether a file holds the predictions for all of the data."""
    return path.is_file() and path.stat().st_size == size(_starts(data)[-1], words)


def open_store(path: Path, data: Data, words: int) -> Store:
    """What `fill` has left."""
    return Store(np.memmap(path, record_type(words), mode="r"), _starts(data))


@torch.no_grad()
def fill(
    path: Path,
    data: Data,
    teacher: RunTeacher,
    words: int,
    temperature: float,
    processes: tuple[int, int, Callable[[], None]],
    watch: Callable[[int, int], None],
    rows: Sequence[int] | None = None,
) -> None:
    """Write the predictions for all sequences, each once, to a file that is whole or absent. One
    process alone goes on where it was stopped before.

    Args:
        teacher: takes one sequence [1, L].
        temperature: of the words' probabilities; not of the loss on the word that comes.
        processes: this process's number, how many there are, and what waits for all of them.
        watch: told of the sequences done, and of all.
        rows: the only sequences to do it for; nothing can be had of the others then.
    """
    number, world, wait = processes
    draft, starts = path.with_suffix(".draft"), _starts(data)
    rows = range(len(data)) if rows is None else rows
    in_order = world == 1 and len(rows) == len(data)
    done_before = _whole_rows(draft, starts, words) if in_order else 0
    if number == 0 and not done_before:
        draft.write_bytes(b"")
    wait()
    with disk_errors(), draft.open("r+b") as file:
        for done in range(done_before + number, len(rows), world):
            row = rows[done]
            batch = data.take(torch.tensor([row]))
            records_T = _records(teacher(batch.tokens_BL), batch, words, temperature)
            file.seek(starts[row] * records_T.itemsize)
            file.write(records_T.tobytes())
            watch(done + 1, len(rows))
    wait()
    if number == 0:
        os.truncate(draft, size(starts[-1], words))
        sync(draft)
        draft.replace(path)
    wait()


def _whole_rows(draft: Path, starts: Sequence[int], words: int) -> int:
    """How many sequences' predictions a draft holds, if they were written one after the other."""
    if not draft.is_file():
        return 0
    held = draft.stat().st_size // record_type(words).itemsize
    return bisect_right(starts, held) - 1


def _records(
    logits_BLV: Tensor, batch: Data, words: int, temperature: float
) -> np.ndarray[Any, Any]:
    """Of one sequence's tokens that foretell one to be learnt."""
    logits_LV, foretelling_L = logits_BLV[0].float(), batch.foretelling_BL[0]
    kept = kept_words(logits_LV[foretelling_L.to(logits_LV.device)], words, temperature)
    surprise_L = torch.zeros(len(foretelling_L))
    coming_L1 = batch.tokens_BL[0, 1:, None].to(logits_LV.device)
    surprise_L[:-1] = -logits_LV[:-1].log_softmax(-1).gather(1, coming_L1)[:, 0].cpu()
    records_T = np.empty(len(kept.rest_T), record_type(words))
    records_T["words"], records_T["log_probs"] = kept.words_TN.cpu(), kept.log_probs_TN.cpu()
    records_T["rest"], records_T["surprise"] = kept.rest_T.cpu(), surprise_L[foretelling_L]
    return records_T


def _starts(data: Data) -> list[int]:
    counts_B = data.foretelling_BL.sum(1)
    return [0, *counts_B.cumsum(0).tolist()]
