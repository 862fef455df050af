"""What a conversion decided and measured."""

import math
from dataclasses import dataclass

from pydantic import FiniteFloat

from upcycle.core.settings import Choice
from upcycle.models.record.check import Check
from upcycle.models.record.merging import Findings, MergePart
from upcycle.models.record.part import Part


@dataclass(frozen=True)
class Trial:
    """A choice of dense layers, carried out on a few tokens."""

    layers: tuple[int, ...]
    ratios: dict[str, float]
    """By text: perplexity over the dense model's."""

    @property
    def mean(self) -> float:
        """The geometric mean over texts."""
        return math.exp(sum(map(math.log, self.ratios.values())) / len(self.ratios))

    @property
    def worst(self) -> float:
        return max(self.ratios.values())


@dataclass(frozen=True)
class DenseLayers:
    """The layers to keep dense, and how they were found."""

    layers: tuple[int, ...]
    damage: list[float]
    trials: list[Trial]


class RecipePart(Part):
    """The recipe's settings, of which those are named here that others read."""

    name: str
    paper: str
    method: Choice
    split: Choice
    shared_by: Choice
    router: Choice | None
    fit: Choice | None = None
    compensate: Choice | None = None
    rest: Choice | None = None
    sequential: bool = False
    calibration: str


class PlanPart(Part):
    """What was to be built."""

    source: str
    family: str
    target: str
    targets: dict[str, str]
    """By name, `ok` or why it can't host the model; so the runtimes, and why they don't run it."""
    runtimes: dict[str, str] = {}
    method: str
    layers: int
    dense_layers: list[int]
    hidden_size: int
    intermediate_size: int
    experts: int
    top_k: int
    granularity: int
    expert_size: int
    shared_size: int
    active_ffn_ratio: FiniteFloat
    params_dense: int
    params_total: int
    params_active: int
    bytes: int
    dtype: str
    device: str
    peak_memory_estimate: int
    check_memory_estimate: int
    gradient_bytes: int = 0
    """Disk for what a backward pass puts aside while the conversion runs; without one, 0."""
    calibration_tokens: int
    check_tokens: int
    feedback: float = 0.0
    warnings: list[str]
    recipe: RecipePart
    merge: MergePart | None = None
    """Of several models."""


class FitPart(Part):
    """What a fit made of a layer's error, |y - ŷ|² / |y|² of its routed neurons' output, on tokens
    that it was not learned from."""

    error_before: FiniteFloat
    error_after: float
    kept: bool
    """Whether what was learned is in the model."""
    budget: FiniteFloat
    smallest_k: int | None = None
    """The fewest experts per token that keep the error within the budget; None: no number does."""


class LayerPart(Part):
    """What became of a layer."""

    layer: int
    dense: bool
    permutation: list[int] | None = None
    """The dense neurons in their new order, shared first, then expert by expert (of a split that is
    no partition, with some of them twice or more and some left out); None of whole copies."""
    fit: FitPart | None = None


class ConversionResult(Part):
    """What a conversion decided and measured."""

    out: str
    plan: PlanPart
    check: Check | None
    seconds: dict[str, FiniteFloat]
    """By stage."""
    peak_memory: int
    """Bytes."""
    dense_layers: DenseLayers | None = None
    """How the layers to keep dense were found, where they were measured."""
    findings: Findings | None = None
    """Of a merge."""
