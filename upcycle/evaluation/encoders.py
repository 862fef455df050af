"""How far an encoder is from the dense model that it was made from, on texts.

An encoder predicts no next token, so it has no perplexity, and nothing can be said of it alone. The
protocol is that of other models, and the numbers are those that the check of a conversion finds.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.machine import choose_device
from upcycle.core.paths import local_path, public_name
from upcycle.core.progress import Progress
from upcycle.evaluation.comparing import counter, decode_windows
from upcycle.evaluation.hidden import compare_hidden, hidden_result
from upcycle.evaluation.measured import (
    Evaluation,
    Flops,
    LayerSimilarity,
    Parameters,
    evaluation_summary,
    flops_beside,
    parameters,
    routing_of,
    similarity_of,
)
from upcycle.evaluation.opening import BUILTIN_SEED, choose_dtype, shared_vocab_size
from upcycle.evaluation.routing import LayerRouting
from upcycle.evaluation.run import evaluate
from upcycle.evaluation.size import measure_size
from upcycle.models.adapter import adapter_base
from upcycle.models.blocks import moe_blocks
from upcycle.models.calibration import check_seq_len
from upcycle.models.config import read_config, read_text_config
from upcycle.models.families import is_encoder
from upcycle.models.head import drop_layers
from upcycle.models.loading import load_model
from upcycle.models.opening import checkpoint_folder
from upcycle.models.record.check import HiddenResult
from upcycle.models.text import check_text
from upcycle.models.tokens import open_reader


@dataclass(frozen=True)
class HiddenEvaluation:
    """What `evaluate_encoder` measured."""

    model: str
    against: str
    window: int
    tokens: int
    """Of each text."""
    texts: list[HiddenResult]
    routing: list[LayerRouting]
    """Over the tokens of all texts."""
    similarity: list[LayerSimilarity]
    params: Parameters
    flops: Flops


def evaluate_any(
    model: str,
    texts: list[str],
    *,
    top_ks: list[int] | None = None,
    speed: bool = False,
    tasks: list[str] | None = None,
    batch_size: int = 1,
    **settings: Any,
) -> Evaluation | HiddenEvaluation:
    """`evaluate`, or of an encoder `evaluate_encoder`.

    Raises:
        UpcycleError: as they do, something is asked of an encoder that only others have, or a
            batch size of nothing.
    """
    if batch_size > 1 and not (speed or tasks):
        raise UpcycleError(
            f"{setting('batch_size', batch_size)} has no effect without `speed` or `tasks`: leave "
            "it out"
        )
    if not _is_encoder(model):
        only: dict[str, Any] = {
            "top_ks": top_ks,
            "speed": speed,
            "tasks": tasks,
            "batch_size": batch_size,
        }
        return evaluate(model, texts, **only, **settings)
    asked = {"top_k": top_ks, "speed": speed, "tasks": tasks}
    for name, value in asked.items():
        if value:
            raise UpcycleError(
                f"{setting(name)} is measured by next tokens, which {model}, an encoder, "
                "does not predict: leave it out"
            )
    return evaluate_encoder(model, texts, **settings)


def summary_of(evaluation: Evaluation | HiddenEvaluation) -> dict[str, Any]:
    """The evaluation as one JSON object, which may be published."""
    if isinstance(evaluation, HiddenEvaluation):
        return hidden_summary(evaluation)
    return evaluation_summary(evaluation)


def hidden_summary(evaluation: HiddenEvaluation) -> dict[str, Any]:
    """The same of an encoder's: of paths only the names."""
    names = {"model": public_name(evaluation.model), "against": public_name(evaluation.against)}
    texts = [replace(text, kind=public_name(text.kind)) for text in evaluation.texts]
    return asdict(replace(evaluation, texts=texts)) | names


def _is_encoder(model: str) -> bool:
    if local_path(model).is_file():
        return False  # a GGUF file, of which none is read that is an encoder's
    with checkpoint_folder(model) as folder:
        return adapter_base(folder) is None and is_encoder(read_config(folder))


def evaluate_encoder(
    model: str,
    texts: list[str],
    *,
    against: str | None,
    tokens: int = 8192,
    seq_len: int = 512,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress = lambda stage, done, total: None,
) -> HiddenEvaluation:
    """Compare an encoder's last hidden states with those of the dense model it was made from.

    Args:
        model, against, texts, tokens, dtype: as of `evaluate`.

    Raises:
        UpcycleError: there is none to compare with, or as `evaluate`.
    """
    if against is None:
        raise UpcycleError(
            f"{model} is an encoder, which predicts no next token: give `against=DENSE`, the model "
            "that it was made from, and their hidden states are compared"
        )
    for text in texts:
        check_text(text, "text")
    place, windows = choose_device(device), max(1, tokens // seq_len)
    step = counter(progress, total := 2 * windows * len(texts))
    with checkpoint_folder(model) as folder, checkpoint_folder(against) as dense_folder:
        check_seq_len(seq_len, read_text_config(folder))
        kind = choose_dtype(dtype, folder, place)
        reader = open_reader(folder, shared_vocab_size(folder, dense_folder))
        read = [reader.windows(text, windows, seq_len, seed=BUILTIN_SEED) for text in texts]
        dense = load_model(dense_folder, kind, place)
        references = [decode_windows(dense, tokens_BL, step) for tokens_BL in read]
        dense_size = measure_size(dense)
        drop_layers(dense)  # one model's are in memory at a time
        own = load_model(folder, kind, place)
    compared = [compare_hidden(own, *pair, step) for pair in zip(read, references, strict=True)]
    progress("evaluating", total, total)
    size, blocks, each = measure_size(own), moe_blocks(own), windows * seq_len
    return HiddenEvaluation(
        model=model,
        against=against,
        window=seq_len,
        tokens=each,
        texts=[hidden_result(text, each, c) for text, c in zip(texts, compared, strict=True)],
        routing=routing_of(blocks, [c.pairs for c in compared], each * len(texts)),
        similarity=similarity_of(blocks),
        params=parameters(size, dense_size),
        flops=flops_beside(size, dense_size),
    )
