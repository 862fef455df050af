"""What a merge is made of: its models, how far apart they are, and what each is worth beside it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from upcycle.core.flags import as_flags
from upcycle.evaluation.page import charts
from upcycle.evaluation.page.section import Section
from upcycle.evaluation.page.words import digits, listing, percent
from upcycle.models.record.file import Made
from upcycle.models.record.merging import Beside, Distances, Findings, GatePart
from upcycle.models.text import kind_name


def merged(made: Made | None) -> Section:
    """What upcycle.json says of a merge's models; None of other conversions."""
    found = made and made.findings
    if not found:
        return None
    sheets = [_distances(found.distances), _perplexities(found.perplexities)]
    return {
        "note": " ".join(_sentences(found)),
        "sheets": [sheet for sheet in sheets if sheet],
        "gates": gates(found.gates),
    }


def _sentences(found: Findings) -> list[str]:
    notes = map(as_flags, found.notes)
    return [*found.sentences, *(f"{note[0].upper()}{note[1:]}." for note in notes)]


def _distances(distances: Distances | None) -> Section:
    if distances is None:
        return None
    rows = [(row.model, percent(row.ffn), percent(row.rest)) for row in distances.sources]
    return {
        "id": "distances",
        "title": "How far each model is from the base",
        "note": "The length of the difference of all weights, over the length of the base's.",
        "headings": ("FFNs", "rest"),
        "rows": rows,
    }


def _perplexities(beside: Beside | None) -> Section:
    if beside is None or not beside.texts:
        return None
    return {
        "id": "beside",
        "title": "Perplexity on the experts' own texts: lower is better",
        "note": "Measured at the merge, on windows that its router was not fitted on; in mixed "
        "text all of them alternate."
        if len(beside.texts) > 1
        else "Measured at the merge, on windows that its router was not fitted on.",
        "headings": [kind_name(text) for text in beside.texts],
        "rows": [(row.model, *map(digits, row.perplexity)) for row in beside.models],
    }


def gates(found: Sequence[GatePart]) -> Section:
    """The condition number of each layer's gate; a column that is infinite is full, and marked.
    None where all are infinite, which is said in a sentence."""
    endless = [gate.layer for gate in found if not math.isfinite(gate.condition)]
    if len(endless) == len(found):
        return None
    finite = charts.top([gate.condition for gate in found]) or 1.0
    drawn = [min(gate.condition, finite) for gate in found]
    chart = charts.columns(drawn, [gate.layer for gate in found], endless)
    columns = [replace(c, value=math.inf) if c.marked else c for c in chart.columns]
    peak = next((place for place, column in enumerate(columns) if column.marked), None)
    shown: dict[str, Any] = {"columns": columns}
    if peak is not None:
        shown |= {"peak": columns[peak], "peak_place": 100 * (peak + 0.5) / len(columns)}
    lost = f"; those of {listing(endless)} cancel out" if endless else ""
    return {
        "note": "The largest singular value of a router's rows over the smallest: at 1 they tell "
        f"the experts apart best{lost}.",
        "endless": bool(endless),
        "chart": replace(chart, **shown),
    }
