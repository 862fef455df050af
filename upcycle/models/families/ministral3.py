"""Ministral 3, the text model of Mistral 3: mistral with queries that grow with their position.

Before `original_max_position_embeddings` the factor is 1. So a model that is never asked for more
positions, or whose `llama_4_scaling_beta` is 0, is a mistral, while one that is has no native MoE.
"""

from typing import Any

from transformers import PreTrainedConfig

from upcycle.core.errors import UpcycleError
from upcycle.models.families.base import FAMILIES, DenseFamily
from upcycle.models.traits import Trait

BETA, ORIGINAL = "llama_4_scaling_beta", "original_max_position_embeddings"
KINDS_WITH_ORIGINAL = {"yarn", "longrope", "llama3"}


def extra(config: PreTrainedConfig) -> dict[str, Any]:
    """The rotary embedding without what only this class reads there."""
    rope = config.rope_parameters
    own = {BETA, "max_position_embeddings"}
    if rope.get("rope_type") not in KINDS_WITH_ORIGINAL:
        own.add(ORIGINAL)
    return {"rope_parameters": {name: value for name, value in rope.items() if name not in own}}


def traits(config: PreTrainedConfig) -> dict[Trait, str]:
    """Raises:
    UpcycleError: a field is missing without which transformers can't run the model.
    """
    for name in (BETA, ORIGINAL):
        if config.rope_parameters.get(name) is None:
            raise UpcycleError(
                f"config.json of this ministral3 has no {name} in rope_parameters, without which "
                f"transformers can't run it: for unscaled queries set {BETA} to 0 and {ORIGINAL} "
                "to max_position_embeddings"
            )
    beta, original = config.rope_parameters[BETA], config.rope_parameters[ORIGINAL]
    if not beta or config.max_position_embeddings <= original:
        return {}
    return {
        Trait.QUERY_SCALING: f"{BETA}={beta} from position {original} on: with "
        f"max_position_embeddings={original} in config.json the model is hosted exactly up to there"
    }


FAMILIES.add("ministral3", DenseFamily("ministral3", extra=extra, traits=traits))
