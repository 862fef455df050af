"""SmolLM3: llama with every fourth layer, or those of a list, without a rotary embedding."""

from typing import Any

from transformers import PreTrainedConfig

from upcycle.models.families.base import FAMILIES, DenseFamily


def extra(config: PreTrainedConfig) -> dict[str, Any]:
    theta, layers = config.rope_parameters["rope_theta"], config.num_hidden_layers
    return {
        "layer_rope_theta": [theta if turned else 0 for turned in config.no_rope_layers[:layers]]
    }


# The interval only says which layers the list has where config.json has no list.
FAMILIES.add(
    "smollm3",
    DenseFamily(
        "smollm3",
        understood=frozenset({"no_rope_layers", "no_rope_layer_interval"}),
        extra=extra,
    ),
)
