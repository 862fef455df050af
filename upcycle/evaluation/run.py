"""How good a model is on text, alone and against the dense model it was made from.

Protocol: windows of the same length are taken evenly from all over a text, each is read on its own,
and its first token is given: the beginning-of-sequence token, where the tokenizer puts one. (The
first windows would be about one or two topics, and that is what the numbers would then differ by.)
Of an encoder-decoder, the first half is given to the encoder, and the decoder's tokens are counted.
Perplexity is the exponential of the mean over windows. One model's layers are in memory at a time,
unless speed is measured, which takes both in turn: what is kept of the dense model are its hidden
states and its head.
"""

import itertools
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors import SafetensorError
from torch import Tensor

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import blaming
from upcycle.core.machine import choose_device
from upcycle.core.paths import public_name
from upcycle.core.progress import Progress
from upcycle.evaluation.routing import LayerRouting, counting_pairs, layer_routing, utilisation
from upcycle.evaluation.size import Size, expert_similarity, flops, measure_size
from upcycle.evaluation.speed import Speed, measure_speed
from upcycle.evaluation.tasks import TaskScores, open_tasks, run_tasks
from upcycle.evaluation.top_k import check_top_ks, made_at, sum_note
from upcycle.models.adapter import adapter_base
from upcycle.models.blocks import MoEBlock, moe_blocks, selecting
from upcycle.models.calibration import check_seq_len
from upcycle.models.config import read_text_config
from upcycle.models.config_fields import check_layers
from upcycle.models.head import Decoded, decode, drop_layers, given
from upcycle.models.history import fitted_on, identity
from upcycle.models.loading import check_asked, check_decoder, kind_of, load_whole
from upcycle.models.opening import checkpoint_folder
from upcycle.models.shards import read_headers
from upcycle.models.text import check_text
from upcycle.models.tokens import open_reader

Step = Callable[[int], None]
"""Told how many windows are done."""

DTYPES = ("float32", "bfloat16", "float16")
CHUNK = 2**24
"""Logits that are computed at once; of some windows and vocabularies all would take gigabytes."""
BUILTIN_SEED = 1
"""Another order of the builtin text than the one that conversions calibrate on."""


@dataclass(frozen=True)
class Comparison:
    """A model's numbers on a text, beside those of a reference if there is one."""

    losses: list[float]
    """Per window, the mean negative log-likelihood of its tokens, in nats."""
    losses_against: list[float]
    """The reference's."""
    kl: float
    """Mean KL(reference ‖ model) per token, in nats."""
    top1_agreement: float
    """Share of tokens whose most likely next token is the same."""
    pairs: list[Tensor]
    """Per MoE layer, how many tokens selected both of two experts [E, E]."""

    @property
    def perplexity(self) -> float:
        return _exp(_doubles(self.losses).mean())

    @property
    def perplexity_against(self) -> float:
        return _exp(_doubles(self.losses_against).mean())

    @property
    def worst_window_ratio(self) -> float:
        """The largest ratio of perplexities, model over reference, of any window."""
        return _exp((_doubles(self.losses) - _doubles(self.losses_against)).max())

    @property
    def load(self) -> list[list[float]]:
        """Per MoE layer and expert: its share of the tokens over the fair share, K / E."""
        return [utilisation(pairs_EE.diagonal()) for pairs_EE in self.pairs]


@dataclass(frozen=True)
class TextResult:
    """A model's numbers on one text; those against another model are None without one."""

    text: str
    perplexity: PositiveFloat
    perplexity_against: PositiveFloat | None
    perplexity_ratio: PositiveFloat | None
    kl: float | None
    top1_agreement: float | None
    worst_window_ratio: float | None = None
    """The largest ratio of perplexities of any window."""
    fitted: bool = False
    """Whether the model was calibrated or trained on this text, which flatters these numbers."""
    load: list[list[float]] = field(default_factory=list)
    """Per MoE layer and expert: its share of this text's selections over the fair share."""


@dataclass(frozen=True)
class LayerSimilarity:
    """How alike a layer's experts are; see `expert_similarity`."""

    layer: int
    cosine: float


@dataclass(frozen=True)
class Parameters:
    """Of the model and of the one it is compared with."""

    total: PositiveInt
    active: PositiveInt
    total_against: int | None
    active_against: int | None


@dataclass(frozen=True)
class Flops:
    """Per token; see `flops`. The total is what a token would take with all experts on."""

    active: PositiveInt
    total: int
    active_against: int | None


@dataclass(frozen=True)
class AtTopK:
    """The same checkpoint's numbers with another number of experts per token."""

    top_k: PositiveInt
    own: bool
    """Whether it is what config.json says."""
    active: PositiveInt
    """Parameters that a token uses."""
    active_share: float
    """Of all parameters."""
    flops: PositiveInt
    """Per token; see `flops`."""
    texts: list[TextResult]
    dead: int
    """Experts of all layers that no token selected."""
    note: str
    """What else changes than the number of experts; mostly empty."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Pydantic's types, such as PositiveFloat, are checked only where one is read from a file.
    """

    model: str
    against: str | None
    window: int
    tokens: int
    """Of each text."""
    texts: Annotated[list[TextResult], Field(min_length=1)]
    routing: list[LayerRouting]
    """Over the tokens of all texts."""
    similarity: list[LayerSimilarity]
    params: Parameters
    flops: Flops
    speed: Speed | None
    tasks: TaskScores | None
    top_ks: list[AtTopK] = field(default_factory=list)
    """The numbers of experts per token that were asked for, with the checkpoint's own among them,
    at which everything else here was measured."""


def evaluation_summary(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation as one JSON object, which may be published: of paths only the names."""
    against = evaluation.against
    summary = asdict(evaluation) | {
        "model": public_name(evaluation.model),
        "against": None if against is None else public_name(against),
    }
    for text in itertools.chain(summary["texts"], *(at["texts"] for at in summary["top_ks"])):
        text["text"] = public_name(text["text"])
    return summary


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
        _base_folder(named) as folder,
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


@contextmanager
def _base_folder(folder: Path) -> Iterator[Path]:
    """The folder itself, or of a low-rank adapter, that of the model that it changes."""
    base = adapter_base(folder)
    if base is None:
        yield folder
        return
    with checkpoint_folder(base) as found:
        yield found


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
        model = _merged(model, pair.adapter)
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


def counter(progress: Progress, total: int) -> Step:
    """Tells `progress` of every window of all texts and models."""
    windows = itertools.count()
    return lambda _: progress("evaluating", next(windows), total)


def routing_of(
    blocks: list[MoEBlock], pairs: list[list[Tensor]], tokens: int
) -> list[LayerRouting]:
    """How so many tokens spread over experts.

    Args:
        pairs: of each text, per layer, as of `Comparison`.
    """
    sums = [torch.stack(column).sum(0) for column in zip(*pairs, strict=True)]
    return [
        layer_routing(block.layer, sum_EE, tokens)
        for block, sum_EE in zip(blocks, sums, strict=True)
    ]


def similarity_of(blocks: list[MoEBlock]) -> list[LayerSimilarity]:
    """How alike the experts of each layer are."""
    return [LayerSimilarity(block.layer, round(expert_similarity(block), 6)) for block in blocks]


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


def parameters(size: Size, dense: Size | None) -> Parameters:
    """A model's, beside the dense one's."""
    if dense is None:
        return Parameters(size.total, size.active, None, None)
    return Parameters(size.total, size.active, dense.total, dense.active)


def flops_beside(size: Size, dense: Size | None) -> Flops:
    """A model's per token, beside the dense one's."""
    against = None if dense is None else flops(dense.matmul_active)
    return Flops(flops(size.matmul_active), flops(size.matmul_total), against)


def shared_vocab_size(folder: Path, dense_folder: Path | None) -> int:
    """Of a model, and of the one that it is compared with.

    Raises:
        UpcycleError: they differ, or one predicts what the other does not.
    """
    vocab_size = int(read_text_config(folder).vocab_size)
    if dense_folder is not None:
        own, reference = kind_of(folder), kind_of(dense_folder)
        if own != reference:
            raise UpcycleError(
                f"`against={dense_folder}` is {reference}, but {folder} is {own}: give the dense "
                "model that it was made from"
            )
        other = int(read_text_config(dense_folder).vocab_size)
        if other != vocab_size:
            raise UpcycleError(
                f"`against={dense_folder}` has a vocabulary of {other:,} tokens, but {folder} one "
                f"of {vocab_size:,}: give the dense model that it was made from"
            )
    return vocab_size


def choose_dtype(name: str, folder: Path, device: torch.device) -> torch.dtype:
    """The dtype that `--dtype` names; `auto` is float32 on a CPU, elsewhere the checkpoint's."""
    if name == "auto":
        own = read_text_config(folder).dtype
        return torch.float32 if device.type == "cpu" or own is None else own
    if name not in DTYPES:
        raise UpcycleError(f"`dtype={name!r}` is unknown: give auto, {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The checkpoint by plain transformers.

    Raises:
        UpcycleError: it does not load, or not every tensor finds its place.
    """
    check_layers(read_text_config(folder).num_hidden_layers, len(read_headers(folder)), folder)
    with warnings.catch_warnings():
        # A target that always has a shared expert holds one of no neurons.
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        with blaming(f"{folder} does not load in transformers"):
            model, info = load_whole(folder, dtype=dtype, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise UpcycleError(f"{folder} does not load whole: {kind} {sorted(info[kind])[:3]}")
    return model.to(device).eval()


def _merged(model: Any, adapter: Path) -> Any:
    """The model with a low-rank adapter added to its weights.

    Raises:
        UpcycleError: peft is missing, or the adapter does not fit the model.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UpcycleError(f"{adapter} is an adapter: `pip install upcycle[lora]`") from error
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UpcycleError(f"{adapter} holds no adapter_model.safetensors, so it is not whole")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return (
                PeftModel.from_pretrained(model, adapter, use_safetensors=True)
                .merge_and_unload()
                .eval()
            )
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError, UserWarning) as error:
        reason = str(error).splitlines()[0]
        raise UpcycleError(f"{adapter} does not fit the model that it names: {reason}") from error


@torch.no_grad()
def next_token_logits(model: Any, window_L: Tensor) -> Tensor:
    """Logits [T, V] in float32 of all tokens in one window [L] that tell the next."""
    logits: Tensor = model(**given(model, window_L), use_cache=False).logits[0].float()
    return logits


def decode_windows(model: Any, tokens_BL: Tensor, step: Step) -> list[Decoded]:
    """Run a dense model's decoder over the windows [B, L], to be the reference of `compare`."""
    decoded = []
    for i, window_L in enumerate(tokens_BL):
        step(i)
        decoded.append(decode(model, window_L))
    return decoded


def compare(
    model: Any, tokens_BL: Tensor, reference: list[Decoded] | None, step: Step
) -> Comparison:
    """Run a model over the windows [B, L] that its reference has seen; without a reference, KL and
    agreement stay 0, and there are no losses of one."""
    windows: list[list[float]] = []
    with counting_pairs(model) as pairs:
        for i, window_L in enumerate(tokens_BL):
            step(i)
            dense = None if reference is None else reference[i]
            windows.append(_compare_window(decode(model, window_L), dense))
    losses, losses_against, kl, agreement = zip(*windows, strict=True)
    return Comparison(
        losses=list(losses),
        losses_against=[] if reference is None else list(losses_against),
        kl=max(sum(kl) / len(kl), 0.0),  # NaN stays; of copies, rounding leaves less than none
        top1_agreement=sum(agreement) / len(agreement),
        pairs=pairs,
    )


def _compare_window(own: Decoded, dense: Decoded | None) -> list[float]:
    """A window's loss, the dense model's, KL and agreement, each the mean over its tokens."""
    length, sums = len(own.tokens_T), torch.zeros(4, dtype=torch.float64)
    rows = max(1, CHUNK // own.model.config.get_text_config().vocab_size)
    for start in range(0, length, rows):
        some = slice(start, start + rows)
        targets_T = own.tokens_T[start + 1 : start + rows + 1]
        own_TV = own.logits(some)
        own_top_T, own_TV = own_TV.argmax(-1), own_TV.log_softmax(-1)
        sums[0] += _loss(own_TV, targets_T)
        if dense is None:
            continue
        dense_TV = dense.logits(some)
        sums[3] += int((dense_TV.argmax(-1) == own_top_T).sum())
        dense_TV = dense_TV.log_softmax(-1)
        sums[1] += _loss(dense_TV, targets_T)
        sums[2] += _divergence(dense_TV, own_TV)
    return (sums / torch.tensor([length - 1, length - 1, length, length])).tolist()


def _loss(log_probs_TV: Tensor, targets_T: Tensor) -> float:
    """The negative log-likelihoods of the next tokens, added up; the last row may have none."""
    targets_T1 = targets_T[:, None].to(log_probs_TV.device)
    return -float(log_probs_TV[: len(targets_T)].gather(1, targets_T1).double().sum())


def _divergence(dense_TV: Tensor, own_TV: Tensor) -> float:
    """KL(dense ‖ own) of log-probabilities, added up over tokens. Overwrites both: a temporary of
    this size costs as much as what is done with it."""
    gap_TV = torch.sub(dense_TV, own_TV, out=own_TV)
    return float(gap_TV.mul_(dense_TV.exp_()).sum(-1).double().sum())


def _doubles(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _exp(loss: Tensor) -> float:
    """Infinite where a float is too small for it."""
    return float(loss.exp())
