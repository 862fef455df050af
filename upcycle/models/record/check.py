"""What a check measured."""

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Discriminator, Field, PlainSerializer, Tag

from upcycle.models.record.part import Measured, Positive


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
