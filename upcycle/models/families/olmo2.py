"""OLMo 2: norms after attention and FFN, and a norm over all heads on q and k."""

from upcycle.models.families.base import FAMILIES, DenseFamily
from upcycle.models.traits import Trait

FAMILIES.add(
    "olmo2",
    DenseFamily(
        "olmo2",
        always={
            Trait.POST_NORM: "olmo2 always has them",
            Trait.QK_NORM_FULL: "olmo2 always has it",
        },
    ),
)
