"""Taylor importance: share the neurons without which the loss would change most.

To first order, the loss changes by h ∂loss/∂h when a neuron puts out nothing on a token. Absolute
values are added up token by token, as LLaMA-MoE does in its clusters (arXiv:2406.16554), or text by
text, as MoEBERT does (arXiv:2204.07675): what a neuron does to a whole text at once, helpful and
harmful tokens against each other.
"""

from typing import Literal

from torch import Tensor

from upcycle.core.importance import GradientParams, taylor_by_text, taylor_by_token
from upcycle.core.types import LayerActivations
from upcycle.split.shared.base import shared_by


class TaylorParams(GradientParams):
    per: Literal["token", "text"] = "token"
    """Of what absolute values are added up; a text is a sequence of `seq_len` tokens."""


@shared_by(
    "taylor",
    summary="largest Taylor importance |h ∂loss/∂h|, by a backward pass",
    paper="arXiv:1906.10771",
    params=TaylorParams,
)
def score(activations: LayerActivations, params: TaylorParams) -> Tensor:
    return (taylor_by_token if params.per == "token" else taylor_by_text)(activations)
