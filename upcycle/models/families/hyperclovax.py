"""HyperCLOVA X: granite, but `logits_scaling` multiplies the logits, which it divides there.

The published HyperCLOVAX-SEED-Think-14B has use_post_norm=true, norms before and after both
attention and FFN, which no native MoE with its multipliers has: only models without them are
hosted. (HyperCLOVAX-SEED-Text-Instruct is a llama.)
"""

from typing import Any

from transformers import PreTrainedConfig

from upcycle.core.errors import UpcycleError
from upcycle.models.families.base import FAMILIES, DenseFamily
from upcycle.models.traits import Trait


def extra(config: PreTrainedConfig) -> dict[str, Any]:
    """Raises:
    UpcycleError: all logits are zero.
    """
    if not config.logits_scaling:
        raise UpcycleError(
            f"config.json sets logits_scaling={config.logits_scaling}, by which hyperclovax "
            "multiplies its logits: a model with any text to write has another factor"
        )
    return {"logits_scaling": 1 / config.logits_scaling}


def traits(config: PreTrainedConfig) -> dict[Trait, str]:
    return {Trait.SANDWICH_NORM: "use_post_norm=true"} if config.use_post_norm else {}


FAMILIES.add(
    "hyperclovax",
    DenseFamily("hyperclovax", understood=frozenset({"use_post_norm"}), extra=extra, traits=traits),
)
