"""EuroBERT: llama whose tokens see all others, with a head that predicts masked ones.

A decoder's class hosts it, for transformers' masks heed `is_causal: false` in any config.json. Its
head is theirs in all but name: what it makes of a hidden state is for that very token, and nothing
shifts it.
"""

from transformers import AutoModelForMaskedLM

from upcycle.models.families.base import ANY, FAMILIES, DenseFamily
from upcycle.models.traits import Trait

FAMILIES.add(
    "eurobert",
    DenseFamily(
        "eurobert",
        always={Trait.BIDIRECTIONAL: "an encoder"},
        # How hidden states are pooled is up to a classifier, whose weights would be refused.
        inert={"pretraining_tp": ANY, "classifier_pooling": ANY},
        carried=("mask_token_id",),
        auto=AutoModelForMaskedLM,
    ),
)
