"""How the tokens spread over a layer's experts, and which experts share tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upcycle.evaluation.measured import Evaluation
from upcycle.evaluation.page import charts
from upcycle.evaluation.page.section import Section
from upcycle.evaluation.page.words import digits, listing, percent, public_name
from upcycle.evaluation.routing import LayerRouting, independent_pairs, pair_counts

FEWEST = 20
"""Tokens, found or expected, from which on two experts' common ones count as evidence."""
REMARKABLE = 5.0
"""Standard deviations. A page looks at thousands of pairs, and tokens of a text are not
independent."""
NAMED = 3
"""Pairs that are named per layer."""
TABLED = 16
"""Experts of which a page shows a table, too, at most."""


def load(layers: Sequence[LayerRouting], likeness: str) -> Section:
    """A row per layer, a column per expert; None where all have the same load.

    Args:
        likeness: a sentence about the experts to add.
    """
    loads = [ratio for layer in layers for ratio in layer.load]
    if len({digits(ratio) for ratio in loads}) < 2:
        return None
    limit = charts.limit(loads)
    dead = sum(layer.dead for layer in layers)
    experts = max(len(layer.load) for layer in layers)
    spread = f"from {digits(min(loads), 2)} to {digits(max(loads), 2)} × the fair share"
    return {
        "note": f"How often each expert is chosen: {spread}; {_evenness(layers)}. {likeness}",
        "text": f"Load of the experts in {len(layers)} layers, {spread}; {dead} are dead.",
        "rows": [
            _load_row(f"layer {layer.layer}", layer.layer, layer.load, limit) for layer in layers
        ],
        "caption": "expert, one row per layer",
        "experts": experts,
        "ticks": charts.ticks(range(experts)),
        "dead": dead,
        **_scale(limit),
    }


def _evenness(layers: Sequence[LayerRouting]) -> str:
    entropies = [layer.entropy for layer in layers]
    ends = dict.fromkeys(f"{end(entropies):.2f}" for end in (min, max))
    return f"the layers' relative entropy is {' to '.join(ends)}, where 1 is perfectly even"


def _load_row(name: str, label: Any, load: Sequence[float], limit: float) -> dict[str, Any]:
    """
    Args:
        name, label: of the row, in full and beside it.
    """
    cells = []
    for expert, ratio in enumerate(load):
        tone = charts.tone(ratio, limit)
        look = "x" if ratio == 0 else "d" if tone < 0 else "u"
        cells.append({"expert": expert, "value": digits(ratio), "tone": abs(tone), "look": look})
    return {"name": name, "label": label, "cells": cells}


def by_text(evaluation: Evaluation) -> Section:
    """A row per text, a column per expert, each the mean over layers; None where there is one text,
    or all are spread alike."""
    # Files of different folders may have one name.
    loads = [(public_name(row.text), _mean_load(row.load)) for row in evaluation.texts if row.load]
    if len({tuple(map(digits, load)) for _, load in loads}) < 2:
        return None
    limit = charts.limit([ratio for _, load in loads for ratio in load])
    experts = max(len(load) for _, load in loads)
    favourites = [
        f"{name} goes to expert {max(range(len(load)), key=load.__getitem__)} most often "
        f"({digits(max(load), 2)} × the fair share)"
        for name, load in loads
    ]
    return {
        "note": f"How often each expert is chosen on each text, over all layers: "
        f"{'; '.join(favourites)}.",
        "text": f"Load of {experts} experts on {len(loads)} texts.",
        "rows": [_load_row(name, name, load, limit) for name, load in loads],
        "caption": "expert, one row per text",
        "experts": experts,
        "ticks": charts.ticks(range(experts)),
        "dead": 0,
        "sheet": _sheet(loads) if experts <= TABLED else None,
        **_scale(limit),
    }


def _mean_load(layers: Sequence[Sequence[float]]) -> list[float]:
    """Of each expert, over layers."""
    return [sum(column) / len(column) for column in zip(*layers, strict=True)]


def _sheet(loads: Sequence[tuple[str, Sequence[float]]]) -> dict[str, Any]:
    experts = max(len(load) for _, load in loads)
    rows = [[name, *(digits(ratio, 2) for ratio in load)] for name, load in loads]
    return {"headings": [f"expert {e}" for e in range(experts)], "rows": rows}


def _scale(limit: float) -> dict[str, str]:
    return {"low": f"÷ {limit:g} or less", "high": f"× {limit:g} or more"}


@dataclass(frozen=True)
class Pairs:
    """How often two of a layer's experts are chosen for the same token, [E, E] each."""

    layer: int
    tokens: int
    count_EE: Tensor
    ratio_EE: Tensor
    """Over what chance would give, at the layer's loads; 1 where the difference may be chance."""
    excess_EE: Tensor
    """Over the same, in standard deviations; 0 where it may be chance."""

    @property
    def best(self) -> list[tuple[int, int]]:
        """The pairs that are most surely together more often than by chance."""
        size = len(self.excess_EE)
        apart = [(i, j) for i in range(size) for j in range(i + 1, size)]
        found = [pair for pair in apart if self.excess_EE[pair] > 0]
        return sorted(found, key=lambda pair: -float(self.excess_EE[pair]))[:NAMED]


def related(layer: LayerRouting, top_k: int, tokens: int) -> Pairs:
    """Which experts of a layer work together, or apart, more than chance explains."""
    count_EE = pair_counts(layer, top_k, tokens)
    expected_EE = independent_pairs(count_EE.diagonal(), top_k, tokens)
    deviation_EE = (expected_EE * (1 - expected_EE / tokens)).clamp(min=1e-9).sqrt()
    excess_EE = (count_EE - expected_EE) / deviation_EE
    sure_EE = (excess_EE.abs() >= REMARKABLE) & (torch.maximum(count_EE, expected_EE) >= FEWEST)
    sure_EE.fill_diagonal_(False)
    ratio_EE = count_EE / expected_EE.clamp(min=1e-9)
    return Pairs(
        layer.layer,
        tokens,
        count_EE,
        torch.where(sure_EE, ratio_EE, 1.0),
        torch.where(sure_EE, excess_EE, 0.0),
    )


def pairs(evaluation: Evaluation, top_k: int) -> Section:
    """Per layer, which experts are chosen for the same tokens: an image of E x E."""
    if top_k < 2:
        return None
    tokens = evaluation.tokens * len(evaluation.texts)
    found = [related(layer, top_k, tokens) for layer in evaluation.routing]
    shown = [layer for layer in found if layer.excess_EE.any()]
    if not shown:
        return None
    ratios = torch.cat([layer.ratio_EE[layer.excess_EE != 0] for layer in shown]).tolist()
    limit = charts.limit(ratios)
    maps = [_pair_map(layer, limit) for layer in shown]
    blank = [layer.layer for layer in found if not layer.excess_EE.any()]
    return {
        "note": "Each square is a layer, its experts along both sides, partners next to each "
        "other: blue where two are chosen for the same tokens more often than by chance, orange "
        "where less often, at their loads; blank where the difference may be chance"
        + (f", as it is all over {listing(blank)}." if blank else "."),
        "layers": maps,
        "places": charts.places(len(maps[0]["order"])),
        "first": max(maps, key=lambda found: found["contrast"]),
        **_scale(limit),
    }


def _pair_map(layer: Pairs, limit: float) -> dict[str, Any]:
    ratios = layer.ratio_EE.tolist()
    order = charts.together(ratios)
    tones = [[charts.tone(ratios[i][j], limit) for j in order] for i in order]
    return {
        "layer": layer.layer,
        "image": charts.image(tones),
        "contrast": sum(abs(tone) for row in tones for tone in row),
        "text": together(layer),
        "order": order,
    }


def together(layer: Pairs) -> str:
    """The surest pairs in a sentence, or only which layer it is."""
    named = ", ".join(
        f"{i} and {j} in {percent(float(layer.count_EE[i, j]) / layer.tokens)} of the tokens "
        f"({digits(float(layer.ratio_EE[i, j]))} × chance)"
        for i, j in layer.best
    )
    return f"Layer {layer.layer}{': most surely together are experts ' if named else ''}{named}."
