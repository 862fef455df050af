"""What an evaluation has measured."""

import itertools
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from upcycle.core.paths import public_name
from upcycle.evaluation.routing import LayerRouting, layer_routing
from upcycle.evaluation.size import Size, expert_similarity, flops
from upcycle.evaluation.speed import Speed
from upcycle.evaluation.tasks import TaskScores
from upcycle.models.blocks import MoEBlock


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


def parameters(size: Size, dense: Size | None) -> Parameters:
    """A model's, beside the dense one's."""
    if dense is None:
        return Parameters(size.total, size.active, None, None)
    return Parameters(size.total, size.active, dense.total, dense.active)


def flops_beside(size: Size, dense: Size | None) -> Flops:
    """A model's per token, beside the dense one's."""
    against = None if dense is None else flops(dense.matmul_active)
    return Flops(flops(size.matmul_active), flops(size.matmul_total), against)
