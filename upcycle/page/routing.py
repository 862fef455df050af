"""How the tokens spread over a layer's experts, and which experts share tokens."""

from collections.abc import Sequence
from typing import Any

from upcycle import charts
from upcycle.page.section import Facts, Section
from upcycle.page.words import digits


def load(layers: Sequence[Facts]) -> Section:
    """A row per layer, its experts from the busiest to the idlest."""
    if not layers:
        return None
    loads = [ratio for layer in layers for ratio in layer["load"]]
    limit = charts.limit(loads)
    rows = [_load_row(layer, limit) for layer in layers]
    dead = sum(layer["dead"] for layer in layers)
    spread = f"from {digits(min(loads), 2)} to {digits(max(loads), 2)} × the fair share"
    entropies = [layer["entropy"] for layer in layers]
    ends = dict.fromkeys(f"{end(entropies):.2f}" for end in (min, max))
    evenness = f"the layers' relative entropy is {' to '.join(ends)}, where 1 is perfectly even"
    return {
        "note": f"How often each expert is chosen: {spread}; {evenness}. Point at a cell for its "
        "number.",
        "text": f"Load of the experts in {len(layers)} layers, {spread}; {dead} are dead.",
        "rows": rows,
        "experts": max(len(row["cells"]) for row in rows),
        "dead": dead,
        **_scale(limit),
    }


def _load_row(layer: Facts, limit: float) -> dict[str, Any]:
    cells = []
    for expert, ratio in sorted(enumerate(layer["load"]), key=lambda pair: -pair[1]):
        tone = charts.tone(ratio, limit)
        look = "x" if ratio == 0 else "d" if tone < 0 else "u"
        cells.append({"expert": expert, "value": digits(ratio), "tone": abs(tone), "look": look})
    return {"layer": layer["layer"], "cells": cells}


def _scale(limit: float) -> dict[str, str]:
    return {"low": f"÷ {limit:g} or less", "high": f"× {limit:g} or more"}


def pairs(layers: Sequence[Facts]) -> Section:
    """Per layer, which experts are chosen for the same tokens: an image of E x E."""
    relative = [relative_pairs(layer["load"], layer["co_selection"]) for layer in layers]
    shown = [(layer, matrix) for layer, matrix in zip(layers, relative, strict=True) if matrix]
    if not shown:
        return None
    limit = charts.limit(ratio for _, matrix in shown for row in matrix for ratio in row)
    maps = [_pair_map(layer["layer"], matrix, limit) for layer, matrix in shown]
    return {
        "note": "Each square is a layer, its experts along both sides, partners next to each "
        "other: blue where two are chosen for the same tokens more often than the layer's average "
        "pair, orange where less often.",
        "layers": maps,
        "first": max(maps, key=lambda found: found["contrast"]),
        **_scale(limit),
    }


def relative_pairs(load: Sequence[float], co_selection: charts.Matrix) -> list[list[float]] | None:
    """Co-selection over that of the layer's average pair; None where a token has one expert.
    1 where there is nothing to compare: on the diagonal, and with a dead expert.

    The average is weighted by how often independent choices would give the pair. It is below 1:
    a token's experts are different ones.
    """
    experts = range(len(load))
    apart = [(i, j) for i in experts for j in experts if i != j]
    weights = sum(load[i] * load[j] for i, j in apart)
    average = sum(co_selection[i][j] * load[i] * load[j] for i, j in apart)
    if average == 0:
        return None
    mean = average / weights
    known = [[i != j and load[i] * load[j] > 0 for j in experts] for i in experts]
    return [[co_selection[i][j] / mean if known[i][j] else 1.0 for j in experts] for i in experts]


def _pair_map(layer: int, ratios: charts.Matrix, limit: float) -> dict[str, Any]:
    order = charts.together(ratios)
    tones = [[charts.tone(ratios[i][j], limit) for j in order] for i in order]
    best = sorted(
        ((ratios[i][j], i, j) for i in range(len(ratios)) for j in range(i)), reverse=True
    )[:3]
    strongest = ", ".join(f"{j} and {i} ({digits(ratio)} ×)" for ratio, i, j in best)
    return {
        "layer": layer,
        "image": charts.image(tones),
        "contrast": sum(abs(tone) for row in tones for tone in row),
        "text": f"Layer {layer}: most often together, against its average pair, are experts "
        f"{strongest}.",
    }
