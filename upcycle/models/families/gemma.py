"""Gemma 1: norm weights stored less one, embeddings times the root of hidden_size."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.models.families.base import FAMILIES, DenseFamily


def rewrite(name: str, tensor: Tensor, config: PreTrainedConfig) -> Mapping[str, Tensor]:
    """Norm weights as every other family stores them; the sum is rounded in the source's dtype."""
    if name.endswith("norm.weight"):
        return {name: (tensor.float() + 1).to(tensor.dtype)}
    return {name: tensor}


def extra(config: PreTrainedConfig) -> dict[str, Any]:
    return {"embedding_multiplier": config.hidden_size**0.5}


FAMILIES.add(
    "gemma",
    DenseFamily("gemma", inert={"use_bidirectional_attention": None}, extra=extra, rewrite=rewrite),
)
