"""Seed-OSS: llama with biases on q, k and v, and one of its own switch on the output."""

from transformers import PreTrainedConfig

from upcycle.models.families.base import ANY, FAMILIES, DenseFamily
from upcycle.models.traits import Trait


def traits(config: PreTrainedConfig) -> dict[Trait, str]:
    return {Trait.O_BIAS: "attention_out_bias=true"} if config.attention_out_bias else {}


FAMILIES.add(
    "seed_oss",
    DenseFamily(
        "seed_oss",
        attention_bias=frozenset({Trait.QKV_BIAS}),
        # Dropouts act in training only; pretraining_tp only ever changed the order of summation.
        inert={"pretraining_tp": ANY, "residual_dropout": ANY},
        understood=frozenset({"attention_out_bias"}),
        traits=traits,
    ),
)
