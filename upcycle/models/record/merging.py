"""What a merge put together, and what that has shown."""

import math
from collections.abc import Iterator

from pydantic import FiniteFloat

from upcycle.core.settings import Choice
from upcycle.models.record.check import Check
from upcycle.models.record.part import Measured, Part, Positive


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
