"""Gemma 1, to whose norms the converter adds one."""

from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.models.gguf.architectures.base import STORED, Stored
from upcycle.models.gguf.fields import llama_like


def restored(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    return tensor - 1 if name.endswith("norm.weight") else tensor


STORED.add("gemma", Stored("gemma", llama_like, restored=restored))
