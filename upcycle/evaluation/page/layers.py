"""What cutting each layer costs, and how alike its experts are."""

from collections.abc import Sequence

from upcycle.evaluation.measured import LayerSimilarity
from upcycle.evaluation.page import charts
from upcycle.evaluation.page.section import Section
from upcycle.evaluation.page.words import digits, listing
from upcycle.models.record.file import Made

ALIKE = 0.05
"""A difference of cosines that counts for nothing."""


def damage(made: Made | None) -> Section:
    """KL per layer if only that layer is cut down; None where all layers are the same."""
    values = made.dense_layers.damage if made and made.dense_layers else []
    if not made or len({digits(value) for value in values}) < 2:
        return None
    kept = made.plan.dense_layers
    fate = f"{listing(kept)} stayed dense" if kept else "no layer stayed dense"
    return {
        "note": f"KL to the dense model, in nats; {fate}.",
        "kept": bool(kept),
        "chart": charts.columns(values, range(len(values)), kept),
    }


def similarity(layers: Sequence[LayerSimilarity]) -> Section:
    """How alike a layer's experts are; None where that is said by `likeness`."""
    values = [layer.cosine for layer in layers]
    if _level(values):
        return None
    return {
        "note": "Mean cosine of the weights of two experts; 0 for different neurons, 1 for copies.",
        "chart": charts.columns(values, [layer.layer for layer in layers], full=1.0),
    }


def likeness(layers: Sequence[LayerSimilarity]) -> str:
    """In a sentence, where the layers are about the same."""
    values = [layer.cosine for layer in layers]
    if not values or not _level(values):
        return ""
    mean = sum(values) / len(values)
    meaning = ", as of different neurons" if mean < ALIKE else ""
    meaning = ", as of copies" if mean > 1 - ALIKE else meaning
    return f"The weights of two experts of a layer have a mean cosine of {mean:.2f}{meaning}."


def _level(values: Sequence[float]) -> bool:
    """Whether columns from 0 to 1 would look the same."""
    return not values or max(values) - min(values) < ALIKE
