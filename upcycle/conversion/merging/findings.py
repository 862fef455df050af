"""What a merge has shown of its models: distances, gates, and perplexities beside each of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from upcycle.conversion.merging.own_texts import MIXED, OwnTexts
from upcycle.conversion.merging.sources import Sources
from upcycle.conversion.plan import Plan
from upcycle.conversion.units import GATE, SEEN
from upcycle.evaluation.beside import perplexities
from upcycle.evaluation.distance import remarks
from upcycle.models.record import (
    Beside,
    CheckReport,
    Distances,
    Findings,
    GatePart,
    ModelPerplexities,
    Report,
    SourceDistance,
)
from upcycle.models.text import public_texts

MERGE = "this merge"
NAMED = 3
"""Pairs of experts that a note names, at most."""


def findings(
    plan: Plan, units: Iterable[Mapping[str, Any]], beside: Beside | None
) -> Findings | None:
    """What the units' entries in the journal come to; None of what is no merge, and of one that
    gets an expert more, whose other models are not read.

    Args:
        beside: the perplexities, if they were measured.
    """
    if plan.sources is None or plan.finished is not None:
        return None
    entries = list(units)
    gates = [GatePart(layer=unit["layer"], **unit[GATE]) for unit in entries if GATE in unit]
    distances, notes = _distances(plan.sources, [unit[SEEN] for unit in entries if SEEN in unit])
    left_out = beside.left_out if beside else []
    return Findings(
        distances=distances,
        gates=gates,
        perplexities=beside,
        notes=[*notes, *_gate_notes(gates), *map(_left_out_note, left_out)],
    )


def _distances(
    sources: Sources, seen: Sequence[Mapping[str, Any]]
) -> tuple[Distances | None, list[str]]:
    """The distances, and what is remarkable of them."""
    meter = sources.meter()
    if meter is None:
        return None, []
    for each in seen:
        meter.add(each)
    names = [sources.public(label) for label in meter.models]
    ffn, rest = meter.distances("ffn"), meter.distances("rest")
    rows = [
        SourceDistance(model=name, ffn=ffn_distance, rest=rest_distance)
        for name, ffn_distance, rest_distance in zip(names, ffn.to_base, rest.to_base, strict=True)
    ]
    found = Distances(sources=rows, between=ffn.between)
    return found, remarks(sources.merge.base.public, names, ffn)


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
    plan: Plan, check: Report, own: OwnTexts, dtype: Any, progress: Any
) -> Beside | None:
    """The perplexities of every source and of their mean on the experts' texts, beside those of
    merge and base, which the check has measured; None where there are no texts.

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
    plan: Plan, sources: Sources, windows: Mapping[str, Tensor], dtype: Any, progress: Any
) -> Iterator[ModelPerplexities]:
    models = len(sources.apart) + 1
    total = models * sum(map(len, windows.values()))
    done = iter(range(total))
    for row in perplexities(
        sources.base,
        sources.apart,
        sources.routed,
        windows,
        dtype,
        plan.device,
        lambda _: progress("measuring sources", next(done), total),
    ):
        name = sources.public(row.model) if row.model in sources.apart else row.model
        yield ModelPerplexities(model=name, perplexity=list(row.texts.values()))
    progress("measuring sources", total, total)


def _public(text: str) -> str:
    return text if text == MIXED else public_texts(text)
