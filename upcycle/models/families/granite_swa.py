"""Granite Swash: granite with attention sinks, a sliding window on some layers, and a rotary base
of its own, or none, for each layer."""

from typing import Any

from transformers import PreTrainedConfig

from upcycle.models.families.base import FAMILIES, DenseFamily
from upcycle.models.traits import Trait


def extra(config: PreTrainedConfig) -> dict[str, Any]:
    return {"layer_rope_theta": list(config.layer_rope_theta[: config.num_hidden_layers])}


FAMILIES.add(
    "granite_swa",
    DenseFamily(
        "granite_swa",
        always={Trait.SINKS: "granite_swa always has them"},
        understood=frozenset({"layer_rope_theta"}),
        extra=extra,
    ),
)
