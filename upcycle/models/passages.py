"""Passages from prompts and texts, and their way through a model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import blaming
from upcycle.core.passages import Passage
from upcycle.models.source import DenseSource
from upcycle.models.stream import PREDICTED_TOKENS, HiddenStream
from upcycle.models.tokens import Reader


def prompt_passage(reader: Reader, prompt: str, expert: int, *, negative: bool = False) -> Passage:
    """A prompt as mergekit-moe reads it: the text of the beginning-of-sequence token, if there is
    one, then the prompt; nothing else is added.

    Raises:
        UpcycleError: it makes no tokens, or one that is outside the model's vocabulary.
    """
    begin = reader.tokenizer.bos_token or ""
    with blaming(f"the tokenizer in {reader.folder} does not work"):
        ids = reader.tokenizer(begin + prompt, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise UpcycleError(
            f"the prompt {prompt!r} of expert {expert} makes no tokens: give it some text"
        )
    reader.check(ids)
    front = int(bool(begin) and ids[0] == reader.tokenizer.bos_token_id)
    return Passage(torch.tensor(ids), expert, negative, front)


def text_passages(
    reader: Reader, text: str, expert: int, *, windows: int, length: int, seed: int
) -> list[Passage]:
    """Windows of a text, as calibration and training read it; of one that holds fewer tokens as
    many as there are, or one shorter window.

    Raises:
        UpcycleError: it can't be read, or holds no tokens.
    """
    body = reader.body(length)
    ids = reader.drawn(text, windows, body, seed=seed).ids
    if not len(ids):
        raise UpcycleError(f"text {text!r} of expert {expert} holds no tokens: give it some")
    width = min(body, len(ids))
    ids_BL = reader.begun(ids[: len(ids) // width * width].view(-1, width))
    return [Passage(ids_L, expert, front=len(reader.front)) for ids_L in ids_BL]


@dataclass(frozen=True)
class Grouped:
    """Passages as a stream takes them: those of one length are one group, the shortest first."""

    passages: Sequence[Passage]

    @cached_property
    def _order(self) -> list[int]:
        lengths = [len(passage.ids_L) for passage in self.passages]
        return sorted(range(len(lengths)), key=lambda place: lengths[place])

    @cached_property
    def groups(self) -> list[Tensor]:
        """Token ids, [B, L] of each length."""
        ids = (self.passages[place].ids_L for place in self._order)
        return [torch.stack(list(group)) for _, group in groupby(ids, key=len)]

    def ungroup(self, rows_TD: Tensor) -> list[Tensor]:
        """What a stream says of its tokens in order, [T, ...], by passage, [L, ...] each."""
        pieces = rows_TD.split([len(self.passages[place].ids_L) for place in self._order])
        found = dict(zip(self._order, pieces, strict=True))
        return [found[place] for place in range(len(self.passages))]


@torch.no_grad()
def next_token_losses(
    source: DenseSource,
    grouped: Grouped,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Tensor]:
    """A model's loss on each passage's next tokens, in nats, [L - 1] each; one layer is in memory
    at a time.

    Args:
        progress: told how many layers are done, of how many.
    """
    outer = source.read(source.outer_names())
    stream = HiddenStream(source.config, outer, grouped.groups, device)
    layers = source.arch.num_layers
    for layer in range(layers):
        progress(layer, layers)
        stream.through(layer, source.read_layer(layer))
    next_T = torch.cat([ids_BL.roll(-1, 1).flatten() for ids_BL in grouped.groups]).to(device)
    pieces = zip(
        stream.last_log_probs(outer, len(next_T)), next_T.split(PREDICTED_TOKENS), strict=True
    )
    losses = [-log_probs_tV.gather(1, next_t[:, None])[:, 0] for log_probs_tV, next_t in pieces]
    progress(layers, layers)
    return [loss_L[:-1] for loss_L in grouped.ungroup(torch.cat(losses).cpu())]


def losses_of_models(per_model: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Each model's losses, one [L - 1] per passage, as one [L - 1, E] per passage."""
    return [torch.stack(list(of_passage), 1) for of_passage in zip(*per_model, strict=True)]
