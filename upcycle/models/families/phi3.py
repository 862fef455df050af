"""Phi-3 and Phi-4: llama with q, k, v fused in one matrix, and gate and up in another."""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.models.families.base import ANY, FAMILIES, DenseFamily, head_dim


def rewrite(name: str, tensor: Tensor, config: PreTrainedConfig) -> Mapping[str, Tensor]:
    """The fused matrices as llama's separate ones."""
    if name.endswith("qkv_proj.weight"):
        query = config.num_attention_heads * head_dim(config)
        key = config.num_key_value_heads * head_dim(config)
        fused, parts = "qkv_proj", {"q_proj": query, "k_proj": key, "v_proj": key}
    elif name.endswith("gate_up_proj.weight"):
        size = config.intermediate_size
        fused, parts = "gate_up_proj", {"gate_proj": size, "up_proj": size}
    else:
        return {name: tensor}
    pieces = tensor.split(list(parts.values()))
    return {name.replace(fused, part): t for part, t in zip(parts, pieces, strict=True)}


FAMILIES.add(
    "phi3",
    DenseFamily(
        "phi3",
        # Dropouts act in training only; the original length also stands in rope_parameters.
        inert={"resid_pdrop": ANY, "embd_pdrop": ANY, "original_max_position_embeddings": ANY},
        partial_rotary=True,
        rewrite=rewrite,
    ),
)
