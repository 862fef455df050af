"""GLM-4 9B and GLM-Edge: llama with gate and up fused in one matrix, biases on q, k and v, and a
rotary embedding that turns neighbouring channels of a part of each head."""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.models.families.base import FAMILIES, DenseFamily
from upcycle.models.rotary import paired_as_llama
from upcycle.models.traits import Trait


def rewrite(name: str, tensor: Tensor, config: PreTrainedConfig) -> Mapping[str, Tensor]:
    if not name.endswith("gate_up_proj.weight"):
        return paired_as_llama(name, tensor, config)
    gate_FD, up_FD = tensor.chunk(2)
    return {
        name.replace("gate_up_proj", "gate_proj"): gate_FD,
        name.replace("gate_up_proj", "up_proj"): up_FD,
    }


FAMILIES.add(
    "glm",
    DenseFamily(
        "glm",
        attention_bias=frozenset({Trait.QKV_BIAS}),
        partial_rotary=True,
        rewrite=rewrite,
    ),
)
