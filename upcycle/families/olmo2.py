"""OLMo 2: norms after attention and FFN, and a norm over all heads on q and k."""

from upcycle.architecture import Trait
from upcycle.families.base import FAMILIES, DenseFamily

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
