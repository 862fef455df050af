"""Which targets host which families, by their tiny models."""

from tiny import FAMILIES, SIZES
from transformers import CONFIG_MAPPING

from upcycle.models.families import describe
from upcycle.models.targets import TARGETS
from upcycle.models.traits import Trait

DECODER_TARGETS = {n: t for n, t in TARGETS.items() if Trait.ENCODER not in t.requires}
"""Those of models of one stack; test_encoder_decoders.py is of the others."""


def hosts(family) -> set[str]:
    """The targets that a random model of the family reaches."""
    arch = describe(CONFIG_MAPPING[family](**(SIZES | FAMILIES[family])))
    return {name for name, target in TARGETS.items() if not target.refusal(arch, experts=8)}
