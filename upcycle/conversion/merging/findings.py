"""What a merge has shown of its models: distances, gates, and perplexities beside each of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from upcycle.conversion.merging.addition import merge_part
from upcycle.conversion.merging.finished import Finished
from upcycle.conversion.merging.own_texts import MIXED, OwnTexts
from upcycle.conversion.merging.sources import Sources
from upcycle.conversion.plan import Plan
from upcycle.conversion.units import GATE, SEEN
from upcycle.core.progress import Progress
from upcycle.evaluation.beside import measured, perplexities
from upcycle.evaluation.distance import Distances as FFNDistances
from upcycle.evaluation.distance import remarks
from upcycle.models.loading import load_model
from upcycle.models.record.check import CheckReport, Report
from upcycle.models.record.file import TEXTUAL
from upcycle.models.record.merging import (
    Beside,
    Distances,
    Findings,
    GatePart,
    ModelPerplexities,
    SourceDistance,
)
from upcycle.models.text import public_texts

MERGE, BEFORE = "this merge", "the merge before"
NAMED = 3
"""Pairs of experts that a note names, at most."""


def findings(
    plan: Plan, units: Iterable[Mapping[str, Any]], beside: Beside | None
) -> Findings | None:
    """What the units' entries in the journal come to; None of what is no merge.

    Of one that gets an expert more, how far the other models are from the base and each other is
    what its record says: they are not read, and do not change.

    Args:
        beside: the perplexities, if they were measured.
    """
    if plan.sources is None:
        return None
    entries = list(units)
    gates = [GatePart(layer=unit["layer"], **unit[GATE]) for unit in entries if GATE in unit]
    distances = _distances(plan.sources, [unit[SEEN] for unit in entries if SEEN in unit])
    twins: list[str] = []
    if plan.finished is not None:
        twins = list(_twin_notes(plan.sources, plan.finished))
        distances = _with_former(_former(plan.finished), distances, known=bool(twins))
    left_out = beside.left_out if beside else []
    return Findings(
        distances=distances,
        gates=gates,
        perplexities=beside,
        notes=[
            *_remarks(plan.sources.merge.base.public, distances),
            *twins,
            *_gate_notes(gates),
            *map(_left_out_note, left_out),
            *_seen_notes(plan, beside),
        ],
    )


def _distances(sources: Sources, seen: Sequence[Mapping[str, Any]]) -> Distances | None:
    meter = sources.meter()
    if meter is None:
        return None
    for each in seen:
        meter.add(each)
    names = [sources.public(label) for label in meter.models]
    ffn, rest = meter.distances("ffn"), meter.distances("rest")
    rows = [
        SourceDistance(model=name, ffn=ffn_distance, rest=rest_distance)
        for name, ffn_distance, rest_distance in zip(names, ffn.to_base, rest.to_base, strict=True)
    ]
    return Distances(sources=rows, between=[list(row) for row in ffn.between])


def _remarks(base: str, found: Distances | None) -> list[str]:
    if found is None:
        return []
    ffn = FFNDistances([source.ffn for source in found.sources], found.between)
    return remarks(base, [source.model for source in found.sources], ffn)


def _former(finished: Finished) -> Distances | None:
    before = finished.record.findings
    return before.distances if before else None


def _with_former(
    former: Distances | None, new: Distances | None, *, known: bool
) -> Distances | None:
    """The distances of a merge's models, and of the one that it gets.

    Args:
        known: whether that is one of these.
    """
    if former is None or new is None or known:
        return former or new
    count = len(former.sources)
    return Distances(
        sources=[*former.sources, *new.sources],
        between=[*([*row, None] for row in former.between), [*[None] * count, 0.0]],
    )


def _twin_notes(sources: Sources, finished: Finished) -> Iterator[str]:
    """Which experts are of the very model that a merge gets."""
    new = finished.num_experts
    fingerprint = sources.models[new].fingerprint()
    for place, expert in enumerate(merge_part(finished.record).experts):
        if expert.fingerprint == fingerprint:
            yield f"experts {place} and {new} are of one model, {expert.model}"


def _seen_notes(plan: Plan, beside: Beside | None) -> Iterator[str]:
    """Which texts the rows and weights that a finished merge brings may know."""
    if beside is None or plan.finished is None:
        return
    record = plan.finished.record
    router = record.plan.recipe.router
    known = dict.fromkeys(map(_public, filter(None, plan.finished.texts)))
    old = [name for name in known if name in beside.texts]
    if old and (record.training or (router and router.name in TEXTUAL)):
        yield (
            f"the merge before may have been made with what is measured here of {' and '.join(old)}"
        )


def _gate_notes(gates: Sequence[GatePart]) -> Iterator[str]:
    """Which experts a router can't tell apart, and where."""
    layers: dict[tuple[int, int], list[int]] = {}
    for gate in gates:
        for pair in gate.alike:
            layers.setdefault(pair, []).append(gate.layer)
    for (one, other), places in list(layers.items())[:NAMED]:
        where = "every layer" if len(places) == len(gates) else _listing(places)
        yield (
            f"in {where} the router's rows of experts {one} and {other} point the same way, so it "
            "can't tell these two apart"
        )
    if len(layers) > NAMED:
        yield f"so it is with {len(layers) - NAMED} more pairs of experts: see upcycle.json"


def _listing(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _left_out_note(text: str) -> str:
    return (
        f"no whole window of {text} is left to measure on that the router was not fitted on: give "
        "more of it, or fit on less (`calibration_tokens`)"
    )


def measure_beside(
    plan: Plan, check: Report, own: OwnTexts, dtype: Any, progress: Progress
) -> Beside | None:
    """The perplexities of every source and of their mean on the experts' texts, beside those of
    merge and base, which the check has measured; of a merge that gets an expert more, those of the
    merge before and the new model. None where there are no texts.

    Raises:
        UpcycleError: a source has changed.
    """
    asked = plan.sources is not None and (own.windows or own.left_out)
    if plan.sources is None or not asked or not isinstance(check, CheckReport):
        return None
    kinds = {kind.kind: kind for kind in check.kinds}
    rows = [
        ModelPerplexities(
            model=MERGE, perplexity=[kinds[text].perplexity_moe for text in own.windows]
        ),
        ModelPerplexities(
            model=plan.sources.merge.base.public,
            perplexity=[kinds[text].perplexity_dense for text in own.windows],
        ),
        *(_measured(plan, plan.sources, own.windows, dtype, progress) if own.windows else ()),
    ]
    return Beside(
        texts=[_public(text) for text in own.windows],
        tokens=[ids_WL.numel() for ids_WL in own.windows.values()],
        models=rows,
        left_out=[_public(text) for text in own.left_out],
    )


def _measured(
    plan: Plan, sources: Sources, windows: Mapping[str, Tensor], dtype: Any, progress: Progress
) -> Iterator[ModelPerplexities]:
    models = len(sources.apart) + 1
    total = models * sum(map(len, windows.values()))
    done, finished = iter(range(total)), plan.finished

    def step(_: int) -> None:
        progress("measuring sources", next(done), total)

    if finished is not None:
        before = load_model(finished.folder, dtype, plan.device)
        row = measured(BEFORE, before, windows, step)
        yield ModelPerplexities(model=BEFORE, perplexity=list(row.texts.values()))
        del before
    averaged = () if finished else sources.routed
    for row in perplexities(
        sources.base, sources.apart, averaged, windows, dtype, plan.device, step
    ):
        name = sources.public(row.model) if row.model in sources.apart else row.model
        yield ModelPerplexities(model=name, perplexity=list(row.texts.values()))
    progress("measuring sources", total, total)


def _public(text: str) -> str:
    return text if text == MIXED else public_texts(text)
