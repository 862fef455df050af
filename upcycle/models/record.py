"""What upcycle leaves beside a model's weights, upcycle.json: one schema, by which it is written
and read.

What a version adds has a default, which is what older records mean; what is not known here is kept
and handed on.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    PlainSerializer,
    Tag,
    ValidationError,
)

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import first_problem, read_json
from upcycle.core.json_text import json_text
from upcycle.core.settings import Choice

RECORD = "upcycle.json"
DOMAINS = "router_domains.safetensors"
"""By which gate `domain` of a merge makes the rows of experts that come later."""
TEXTUAL = ("text", "loss", "perplexity", "domain")
"""Routers of merges that are fitted to prompts or texts."""
OURS = "what upcycle writes"
LARGEST = 1e300


def _not_absurd(value: float) -> float:
    """What a diverged run may leave: nothing finite that arithmetic would make infinite."""
    if math.isfinite(value) and abs(value) > LARGEST:
        raise ValueError(f"it is beyond {LARGEST:g}")
    return value


def _above_zero(value: float) -> float:
    """Or no number at all, as of logits that overflow."""
    if value <= 0:
        raise ValueError("it must be above 0")
    return value


Measured = Annotated[float, AfterValidator(_not_absurd)]
Positive = Annotated[Measured, AfterValidator(_above_zero)]
"""Checked only where a record is read."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a run is known by, in its journal and in the record of its result."""

    fingerprint: str
    """Of everything that its bytes depend on."""
    threads: int
    """Of torch, by which sums in floating point differ; part of the fingerprint."""


@dataclass(frozen=True)
class KindResult:
    """What the conversion did to one kind of text."""

    kind: str
    """The name of the text: of the calibration, of which this was held back, or `probe:…`."""
    tokens: int
    perplexity_dense: Positive
    perplexity_moe: Positive
    ratio: Positive
    worst_window: float
    """The largest ratio of any window."""
    kl: float
    """Mean KL(dense ‖ MoE) per token, in nats."""
    top1_agreement: float
    """Share of tokens whose most likely next token is the same."""


@dataclass(frozen=True)
class HiddenResult:
    """What the conversion did to an encoder's last hidden states on one kind of text."""

    kind: str
    """As of `KindResult`."""
    tokens: int
    error: Measured
    """Root mean square difference over the dense model's standard deviation."""
    worst_window: Measured
    """The largest such error of any window."""
    cosine: float
    """Of a token's hidden state and the dense model's, the mean over tokens."""
    pooled_cosine: float
    """The same of windows' means, by which texts are compared."""


class _Read:
    """What both kinds of a check have to say of the tokens that were read."""

    kinds: Any
    load: Any

    @property
    def tokens(self) -> int:
        return sum(kind.tokens for kind in self.kinds)

    @property
    def dead_experts(self) -> int:
        return sum(share == 0 for layer in self.load for share in layer)


@dataclass(frozen=True)
class CheckReport(_Read):
    """What the check measured."""

    exact_error: float | None
    """Root mean square difference of the logits over their standard deviation, with every expert
    on for a split; None for copies that were changed on purpose, or of which tokens get parts."""
    exact_tolerance: float
    kinds: Annotated[list[KindResult], Field(min_length=1)]
    left_out: list[str]
    """Kinds that could not be had."""
    window: int
    load: list[list[float]]
    """Per MoE layer and expert: its share of the tokens over the fair share, K / E."""

    @property
    def ratios(self) -> dict[str, float]:
        """By kind of text."""
        return {kind.kind: kind.ratio for kind in self.kinds}

    @property
    def worst(self) -> KindResult:
        """The kind that lost most."""
        return max(self.kinds, key=lambda kind: kind.ratio)

    @property
    def perplexity_ratio(self) -> float:
        """The worst kind's."""
        return self.worst.ratio

    @property
    def mean_ratio(self) -> float:
        """The geometric mean over kinds."""
        return math.exp(sum(math.log(kind.ratio) for kind in self.kinds) / len(self.kinds))


@dataclass(frozen=True)
class EncoderReport(_Read):
    """What the check measured of an encoder, which has no next token to predict."""

    exact_error: float | None
    """As of `CheckReport`; of hidden states where it has no head."""
    exact_tolerance: float
    kinds: Annotated[list[HiddenResult], Field(min_length=1)]
    left_out: list[str]
    window: int
    load: list[list[float]]

    @property
    def worst(self) -> HiddenResult:
        """The kind that lost most."""
        return max(self.kinds, key=lambda kind: kind.error)


Report = CheckReport | EncoderReport


def check_summary(check: Report) -> dict[str, Any]:
    """The check as plain values, with what follows from them."""
    if isinstance(check, EncoderReport):
        numbers = {"hidden_error": check.worst.error}
    else:
        numbers = {"perplexity_ratio": check.perplexity_ratio, "mean_ratio": check.mean_ratio}
    worst, dead = {"worst_kind": check.worst.kind}, {"dead_experts": check.dead_experts}
    return asdict(check) | worst | numbers | dead


def _kind_of_check(check: Any) -> str:
    """By what it says of a text; of one that says nothing, a decoder's."""
    if isinstance(check, dict):
        kinds = check.get("kinds")
        first = kinds[0] if isinstance(kinds, list) and kinds else None
        return "<encoder>" if isinstance(first, dict) and "cosine" in first else "<decoder>"
    return "<encoder>" if isinstance(check, EncoderReport) else "<decoder>"


Check = Annotated[
    Annotated[CheckReport, Tag("<decoder>")] | Annotated[EncoderReport, Tag("<encoder>")],
    Discriminator(_kind_of_check),
    PlainSerializer(check_summary),
]


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


@dataclass(frozen=True)
class Used:
    """How much of a text is trained on."""

    text: str
    tokens: int
    held_out: int
    """Tokens of its end, on which it is validated."""
    total: int | None
    """That the text holds; roughly, of a long one; None: nobody knows."""


@dataclass(frozen=True)
class Alarm:
    """What went wrong while a model was trained."""

    step: int
    """After which it was noticed."""
    about: str
    """What it is about; nothing is said twice."""
    says: str
    """What was measured and what to do, in a sentence without its end."""


class Part(BaseModel):
    """Of a record."""

    model_config = ConfigDict(frozen=True, extra="allow")

    def plain(self) -> dict[str, Any]:
        """What was given, as plain values."""
        return self.model_dump(exclude_unset=True)


class Source(Part):
    """The dense checkpoint that a model was made from."""

    name: str
    """A hub id, or the way from the folder of the record."""
    revision: str | None = None
    fingerprint: str | None = None

    def place(self, folder: Path) -> Path | None:
        """Where the dense model lies here, if it is not on the hub; `folder` holds the record."""
        found = folder.resolve() / self.name
        return found.resolve() if self.revision is None and found.exists() else None

    def model(self, folder: Path) -> str | None:
        """The dense model by the name that finds it from anywhere; None if nothing does."""
        if self.revision is not None:
            return self.name
        place = self.place(folder)
        return None if place is None else str(place)


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


class ExpertPart(Part):
    """One model of a merge, and what became of its FFN."""

    model: str
    """A hub id, or a local path's last part; `model@revision+adapter`."""
    prompts: list[str] = []
    negatives: list[str] = []
    text: str | None = None
    noise_scale: FiniteFloat = 0.0
    residual_scale: FiniteFloat = 1.0
    fingerprint: str | None = None


class MergePart(Part):
    """Which models a merge put together; its base is the source."""

    experts: list[ExpertPart]
    shared: ExpertPart | None = None


class SourceDistance(Part):
    """How far a model of a merge is from the base: the length of the difference of their weights,
    over the length of the base's."""

    model: str
    ffn: FiniteFloat
    rest: FiniteFloat
    """Of all weights that are no FFN's."""


class Distances(Part):
    """How far the models of a merge are from the base, and from each other."""

    sources: list[SourceDistance]
    """Every model once, but the base."""
    between: list[list[FiniteFloat | None]]
    """Of the FFNs of each two, over the length of the base's; None of two that were not read
    together, as of one that came later."""

    @property
    def nearest(self) -> tuple[int, int, float] | None:
        """The two models that are least far from each other, and how far; None where no two are
        known."""
        pairs = [
            (i, j, apart)
            for j in range(len(self.sources))
            for i, apart in enumerate(self.between[j][:j])
            if apart is not None
        ]
        return min(pairs, key=lambda pair: pair[2], default=None)

    @property
    def whole(self) -> bool:
        """Whether it is known of each two how far they are from each other."""
        return all(apart is not None for row in self.between for apart in row)


class GatePart(Part):
    """How well the router's rows of a layer tell its experts apart."""

    layer: int
    condition: Measured
    """The rows' largest over their smallest singular value: 1 is best."""
    alike: list[tuple[int, int]] = []
    """Experts whose rows point the same way."""


class ModelPerplexities(Part):
    """One model beside a merge."""

    model: str
    perplexity: list[Positive]
    """On each text."""


class Beside(Part):
    """The perplexities of a merge and of what it is made of, on windows of the experts' texts that
    nothing was fitted on."""

    texts: list[str]
    """The experts' own, then one in which all of them alternate, if there are several."""
    tokens: list[int]
    """Of each."""
    models: list[ModelPerplexities]
    """The merge, the base, every source and their mean as a dense model; of one that got an expert
    more, the merge, the base, the merge before and the new model."""
    left_out: list[str] = []
    """Texts of which nothing was left to measure on."""


class Findings(Part):
    """What putting the models together has shown of them."""

    distances: Distances | None = None
    """None where all models are the base."""
    gates: list[GatePart] = []
    perplexities: Beside | None = None
    """None without text, or a check."""
    notes: list[str] = []

    @property
    def sentences(self) -> list[str]:
        """Which models are nearest, and how well the gates tell their experts apart."""
        return [*self._nearest(), *self._gates()]

    def _nearest(self) -> Iterator[str]:
        found = self.distances
        if found is None or found.nearest is None:
            return
        one, other, apart = found.nearest
        names = found.sources[one].model, found.sources[other].model
        nearest = "Nearest to each other" if found.whole else "Nearest of those merged together"
        yield (
            f"{nearest} are {names[0]} and {names[1]}: their FFNs are {100 * apart:.3g} % of the "
            "base's length apart."
        )

    def _gates(self) -> Iterator[str]:
        if not self.gates:
            return
        worst = max(self.gates, key=lambda gate: gate.condition)
        least = min(gate.condition for gate in self.gates)
        ends = dict.fromkeys(f"{value:.3g}" for value in (least, worst.condition))
        meaning = "1 tells experts apart best"
        if math.isinf(worst.condition):
            meaning = "infinite where rows cancel out, as those that are fitted to text do"
        yield (
            f"Condition number of the router's rows: {' to '.join(ends)} (layer {worst.layer}); "
            f"{meaning}."
        )


class AddedPart(Part):
    """An expert that came to a finished merge."""

    expert: int
    """Its number; those before it stayed as they were."""
    router: Choice
    """What made its rows."""
    after_training: int
    """How many of the runs of `training` had been before."""
    upcycle: str
    """The version."""
    check_before: Check | None = None
    """What the check of the merge before had measured."""
    findings_before: Findings | None = None
    """What the merge before had shown."""


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


class TrainingSettings(Part):
    """The settings of a training run, of which those are named here that others read."""

    name: str
    data: str
    teacher: str | None = None


class Zeros(Part):
    """Of what the activations of a dense model put out for the held-out text, the share that is
    exactly zero."""

    original: float
    """With the activation that the model came with."""
    before: float
    """With the new one, before training."""
    after: float
    """With the new one, after it."""


class TrainingResult(Part):
    """What a training run did and measured."""

    model: str
    out: str
    settings: TrainingSettings
    groups: dict[str, dict[str, int]]
    """Per group, how many parameters it has, and how many train."""
    used: tuple[Used, ...] = ()
    before: dict[str, Measured]
    after: dict[str, Measured]
    step: int
    """Whose state was kept."""
    steps: int
    tokens: int
    seconds: FiniteFloat
    processes: int
    texts: dict[str, tuple[Measured, Measured]] = {}
    """Perplexity of the held-out part of each text, before and after."""
    zeros: Zeros | None = None
    """Where a dense model got another activation."""
    alarms: tuple[Alarm, ...] = ()
    reload_error: float | None
    """Root mean square difference of the written checkpoint's logits from the trained model's,
    over their standard deviation."""


class TrainingRun(TrainingResult):
    """A training run, as the record of its result tells of it."""

    upcycle: str
    """The version."""
    check_before: Check | None
    """What the conversion measured, which is no longer true of the trained weights."""


class Trained(Part):
    """upcycle.json of a model that upcycle trained but did not make."""

    check: Check | None = None
    training: list[TrainingRun] = []
    run: Identity | None = None
    """The last one."""


class Made(ConversionResult):
    """upcycle.json of a model that upcycle made, and may have trained since.

    It is published, so a local source is named by its way from the folder, and other files by
    their names alone.
    """

    versions: dict[str, str]
    source: Source
    run: Identity | None = None
    """The last one."""
    layers: list[LayerPart] = []
    training: list[TrainingRun] = []
    added: list[AddedPart] = []
    """Experts that came later, in their order."""

    @property
    def router_texts(self) -> list[str]:
        """The texts of a merge's experts, if a router was fitted to them."""
        routers = [self.plan.recipe.router, *(each.router for each in self.added)]
        if self.plan.merge is None or not any(r and r.name in TEXTUAL for r in routers):
            return []
        return [expert.text for expert in self.plan.merge.experts if expert.text]


Record = Made | Trained


def record_text(record: Record) -> str:
    """An upcycle.json."""
    return json_text(record.plain()) + "\n"


def read_record(path: Path) -> Record:
    """An upcycle.json.

    Raises:
        UpcycleError: it is something else.
    """
    return record_of(read_json(path, OURS), path)


def record_of(fields: Any, path: Path) -> Record:
    """The values of an upcycle.json as what they are.

    Raises:
        UpcycleError: they are something else; the sentence names the field.
    """
    trained = isinstance(fields, dict) and "training" in fields and "plan" not in fields
    kind: type[Record] = Trained if trained else Made
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise UpcycleError(
            f"{path} is not {OURS}: {first_problem(error)}: restore or delete it"
        ) from error
