"""Calibration text: what a conversion is fitted on, and what of it is held back."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.core.errors import UpcycleError
from upcycle.core.progress import Progress
from upcycle.models.companions import companions
from upcycle.models.own_text import written_tokens
from upcycle.models.source import DenseSource
from upcycle.models.text import PROBES, text_files, texts
from upcycle.models.tokens import Reader, open_reader

CHECK_WINDOW = 512
"""Tokens of a window on which the check measures, at most: built-in probes are short."""
REMEDIES = (
    "for the check: give more text, or pass `check=none`",
    "(check included): lower `seq_len`, add `check=none`, or give more text",
    "(check included): lower `calibration_tokens`, or give more text",
)
"""Of too little text, where no sequence is fitted on, one, or more."""


@dataclass(frozen=True)
class Calibration:
    """What a conversion is fitted on, and what its check measures it on."""

    fit_BL: Tensor
    held: Mapping[str, Tensor]
    """By the kind of text, windows [W, L] that nothing is fitted on."""
    front: tuple[int, ...] = ()
    """What begins every window, as the model's tokenizer would begin it."""


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

    They are windows as `tokens.py` makes them; sequences are taken
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
    if not sequences + windows:
        return Calibration(torch.empty(0, seq_len, dtype=torch.int64), {})
    vocab_size = source.config.vocab_size
    reader = open_reader(source.folder, vocab_size, encoder=source.arch.encoder)
    window = min(seq_len, CHECK_WINDOW)
    length, part = reader.body(seq_len), reader.body(window)
    names = [name for name in texts(text) if name != "none"]
    fit_BT = torch.empty(sequences, length, dtype=torch.int64)
    held: dict[str, Tensor] = {}
    # What the model writes comes last: it takes longest, and another text may be at fault.
    for place in sorted(range(len(names)), key=lambda place: names[place] == "self"):
        name, mine_BT = names[place], fit_BT[place :: len(names)]
        back = 0 if name == "builtin" else -(-windows * part // length)
        count = len(mine_BT) + back
        if not count:
            continue
        if name == "self":
            ids = written_tokens(source, reader.tokenizer, count * length, seed, device, progress)
            all_BT = ids[: count * length].view(-1, length)
        else:
            remedy = REMEDIES[min(len(mine_BT), 2)]
            all_BT = reader.bodies(name, count, length, seed=seed, remedy=remedy)
        mine_BT[:] = all_BT[: len(mine_BT)]
        if back:
            rest_T = all_BT[len(mine_BT) :].flatten()
            held[name] = reader.begun(rest_T[: windows * part].view(-1, part))
    if windows:
        held |= probes(reader, windows, window)
    return Calibration(reader.begun(fit_BT), held, reader.front)


def probes(reader: Reader, windows: int, window: int) -> dict[str, Tensor]:
    """At most so many windows of each kind of built-in text that nothing is fitted on."""
    found = {}
    for name in PROBES:
        ids = reader.first(name, windows * reader.body(window), seed=0)
        length = min(reader.body(window), len(ids))
        found[name] = reader.begun(ids[: len(ids) // length * length].view(-1, length))
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
            f"`seq_len={seq_len}` is more than the model's {positions} positions "
            f"(max_position_embeddings): give `seq_len={positions}`"
        )


def text_fingerprint(folder: Path, text: str) -> list[str]:
    """SHA-256 of what tokens are made from, where it lies here: the text's files, and those that
    travel with the model, its tokenizer's among them."""
    digests = []
    for path in (*companions(folder), *text_files(text)):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests
