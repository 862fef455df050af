"""How good a model is on text, alone and against the dense model it was made from.

Protocol: windows of the same length are taken evenly from all over a text, each is read on its own,
and its first token is given: the beginning-of-sequence token, where the tokenizer puts one. (The
first windows would be about one or two topics, and that is what the numbers would then differ by.)
Of an encoder-decoder, the first half is given to the encoder, and the decoder's tokens are counted.
Perplexity is the exponential of the mean over windows. One model's layers are in memory at a time,
unless speed is measured, which takes both in turn: what is kept of the dense model are its hidden
states and its head.
"""

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle.core.errors import UpcycleError
from upcycle.core.machine import choose_device
from upcycle.core.progress import Progress
from upcycle.evaluation.comparing import Comparison, Step, compare, counter, decode_windows
from upcycle.evaluation.measured import (
    AtTopK,
    Evaluation,
    TextResult,
    flops_beside,
    parameters,
    routing_of,
    similarity_of,
)
from upcycle.evaluation.opening import (
    BUILTIN_SEED,
    base_folder,
    choose_dtype,
    merged,
    shared_vocab_size,
)
from upcycle.evaluation.routing import LayerRouting
from upcycle.evaluation.size import Size, flops, measure_size
from upcycle.evaluation.speed import measure_speed
from upcycle.evaluation.tasks import open_tasks, run_tasks
from upcycle.evaluation.top_k import check_top_ks, made_at, sum_note
from upcycle.models.blocks import moe_blocks, selecting
from upcycle.models.calibration import check_seq_len
from upcycle.models.config import read_text_config
from upcycle.models.head import Decoded, drop_layers
from upcycle.models.history import fitted_on, identity
from upcycle.models.loading import check_asked, check_decoder, load_model
from upcycle.models.opening import checkpoint_folder
from upcycle.models.text import check_text
from upcycle.models.tokens import open_reader


def evaluate(
    model: str,
    texts: list[str],
    *,
    against: str | None = None,
    tokens: int = 8192,
    seq_len: int = 512,
    top_ks: list[int] | None = None,
    speed: bool = False,
    tasks: list[str] | None = None,
    batch_size: int = 1,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
) -> Evaluation:
    """Evaluate a checkpoint on texts, alone or beside the dense model it was made from.

    Args:
        model, against: folders, hub ids or GGUF files; both must share a tokenizer. `model` may
            be a low-rank adapter's folder, which is merged into the model that it changes.
        texts: each a file, `builtin` or `hf:…`, as for calibration.
        tokens: how many of each text, in windows from all over it.
        top_ks: other numbers of experts per token to measure the model at, on the same texts.
        speed: measure both models' too, with both in memory.
        tasks: of lm-eval, to be run as well.
        batch_size: sequences at once, for speed and tasks.
        dtype: `auto` is float32 on a CPU, elsewhere the checkpoint's own.

    Raises:
        UpcycleError: a model or a text can't be read, a setting is wrong, or lm-eval is missing.
    """
    for text in texts:
        check_text(text, "text")
    place, windows = choose_device(device), max(1, tokens // seq_len)
    if speed:
        _check_batch(batch_size, windows * len(texts))
    with (
        checkpoint_folder(model) as named,
        base_folder(named) as folder,
        nullcontext() if against is None else checkpoint_folder(against) as dense_folder,
    ):
        adapter = None if named == folder else named
        check_decoder(model, folder)
        check_asked(model, folder, speed=speed, tasks=bool(tasks))
        suite = open_tasks(tasks) if tasks else None
        check_seq_len(seq_len, read_text_config(folder))
        kind = choose_dtype(dtype, folder, place)
        reader = open_reader(folder, shared_vocab_size(folder, dense_folder))
        tokens_NBL = torch.stack(
            [reader.windows(text, windows, seq_len, seed=BUILTIN_SEED) for text in texts]
        )
        pair = _Pair(model, folder, adapter, against, dense_folder, kind, place)
        timed = batch_size if speed else 0
        measured = _measure(pair, texts, tokens_NBL, top_ks or [], timed, progress)
        if suite is None:
            return measured
        progress("tasks", 0, 1)
        settings = {"dtype": str(kind).removeprefix("torch."), "device": str(place)}
        scores = run_tasks(
            suite, folder, dense_folder, adapter=adapter, batch_size=batch_size, **settings
        )
        progress("tasks", 1, 1)
        return replace(measured, tasks=scores)


def _check_batch(batch_size: int, windows: int) -> None:
    if batch_size > windows:
        raise UpcycleError(
            f"`batch_size={batch_size}` needs as many windows of text, but there are "
            f"{windows}: raise `tokens`"
        )


@dataclass(frozen=True)
class _Pair:
    """A model, perhaps the dense one that it is compared with, and how to load them."""

    model: str
    folder: Path
    adapter: Path | None
    against: str | None
    dense_folder: Path | None
    dtype: torch.dtype
    device: torch.device


def _measure(
    pair: _Pair,
    texts: list[str],
    tokens_NBL: Tensor,
    top_ks: list[int],
    batch_size: int,
    progress: Progress,
) -> Evaluation:
    """Everything but tasks, on N texts.

    Args:
        top_ks: numbers of experts per token to measure the model at, beside its own.
        batch_size: for the speed, which is not measured if it is 0.
    """
    passes = (1 if pair.dense_folder is None else 2) + len(top_ks)
    total = tokens_NBL.shape[:2].numel() * passes
    step = counter(progress, total)
    dense, dense_size, references = _reference(pair, tokens_NBL, step)
    if not batch_size and dense is not None:
        drop_layers(dense)  # one model's are in memory at a time
        dense = None
    model = load_model(pair.folder, pair.dtype, pair.device)
    if pair.adapter is not None:
        model = merged(model, pair.adapter)
    size, blocks = measure_size(model), moe_blocks(model)
    check_top_ks(top_ks, blocks, pair.model)
    seen = fitted_on(pair.adapter or pair.folder)

    def run() -> tuple[list[TextResult], list[LayerRouting]]:
        rows = zip(tokens_NBL, references, strict=True)
        compared = [compare(model, tokens_BL, reference, step) for tokens_BL, reference in rows]
        pairs = [numbers.pairs for numbers in compared]
        return _text_results(texts, compared, seen), routing_of(blocks, pairs, tokens_NBL.numel())

    results, routing = run()
    at_top_ks = _at_top_ks(pair, model, top_ks, run, results, routing) if top_ks else []
    progress("evaluating", total, total)
    speed = None
    if batch_size:
        batch_BL = tokens_NBL.flatten(0, 1)[:batch_size]
        speed = measure_speed(
            model, dense, batch_BL, lambda done, rounds: progress("timing", done, rounds)
        )
    return Evaluation(
        model=pair.model,
        against=pair.against,
        window=tokens_NBL.shape[2],
        tokens=tokens_NBL[0].numel(),
        texts=results,
        routing=routing,
        similarity=similarity_of(blocks),
        params=parameters(size, dense_size),
        flops=flops_beside(size, dense_size),
        speed=speed,
        tasks=None,
        top_ks=at_top_ks,
    )


def _reference(
    pair: _Pair, tokens_NBL: Tensor, step: Step
) -> tuple[Any, Size | None, list[list[Decoded] | None]]:
    """The dense model, its size and what it says of the windows of each text; None without one."""
    if pair.dense_folder is None:
        return None, None, [None] * len(tokens_NBL)
    dense = load_model(pair.dense_folder, pair.dtype, pair.device)
    decoded: list[list[Decoded] | None] = [
        decode_windows(dense, tokens_BL, step) for tokens_BL in tokens_NBL
    ]
    return dense, measure_size(dense), decoded


def _at_top_ks(
    pair: _Pair,
    model: Any,
    top_ks: list[int],
    run: Callable[[], tuple[list[TextResult], list[LayerRouting]]],
    results: list[TextResult],
    routing: list[LayerRouting],
) -> list[AtTopK]:
    """The model at each of these numbers of experts per token, and at its own.

    Args:
        run: measures the model as it stands.
        results, routing: what that gave at its own number.
    """
    own, made = moe_blocks(model)[0].top_k, made_at(pair.folder)
    found = []
    for top_k in sorted({own, *top_ks}):
        with selecting(model, top_k):
            texts, layers = (results, routing) if top_k == own else run()
            size = measure_size(model)
        found.append(
            AtTopK(
                top_k=top_k,
                own=top_k == own,
                active=size.active,
                active_share=size.active / size.total,
                flops=flops(size.matmul_active),
                texts=texts,
                dead=sum(layer.dead for layer in layers),
                note=sum_note(made, model.config, top_k),
            )
        )
    return found


def _text_results(
    texts: list[str], compared: list[Comparison], seen: Collection[str]
) -> list[TextResult]:
    return [
        replace(_text_result(text, numbers), fitted=identity(text) in seen)
        for text, numbers in zip(texts, compared, strict=True)
    ]


def _text_result(text: str, measured: Comparison) -> TextResult:
    if not measured.losses_against:
        return TextResult(text, measured.perplexity, None, None, None, None, load=measured.load)
    return TextResult(
        text,
        measured.perplexity,
        measured.perplexity_against,
        measured.perplexity / measured.perplexity_against,
        measured.kl,
        measured.top1_agreement,
        measured.worst_window_ratio,
        load=measured.load,
    )
