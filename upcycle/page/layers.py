"""What cutting each layer costs, and how alike its experts are."""

from collections.abc import Sequence

from upcycle import charts
from upcycle.page.section import Facts, Section
from upcycle.page.words import listing

ALIKE = 0.05
"""Experts whose cosine is below it are as good as orthogonal."""


def damage(made: Facts | None) -> Section:
    """KL per layer if only that layer is cut down."""
    values = made and made["damage"]
    if not made or not values:
        return None
    kept = made["plan"]["dense_layers"]
    fate = f"{listing(kept)} stayed dense" if kept else "no layer stayed dense"
    return {
        "note": f"KL to the dense model, in nats; {fate}.",
        "kept": bool(kept),
        "chart": charts.columns(values, range(len(values)), kept),
    }


def similarity(layers: Sequence[Facts]) -> Section:
    """How alike a layer's experts are."""
    if not layers:
        return None
    values = [layer["cosine"] for layer in layers]
    if max(values) < ALIKE:
        meaning = "near 0: they hold different neurons"
    elif min(values) > 1 - ALIKE:
        meaning = "near 1: they are copies of each other"
    else:
        meaning = "0 for different neurons, 1 for copies"
    return {
        "note": f"Mean cosine of the weights of two experts; {meaning}.",
        "chart": charts.columns(values, [layer["layer"] for layer in layers], full=1.0),
    }
