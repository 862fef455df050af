"""What a loaded model is made of: parameters, multiplications per token, how alike its experts
are."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from upcycle.models.blocks import MoEBlock, moe_blocks, text_modules


@dataclass(frozen=True)
class Size:
    """Numbers of parameters, selection biases too; `active` are those that one token uses."""

    total: int
    active: int
    matmul_total: int
    matmul_active: int
    """Those that a token is multiplied by. Not the embeddings, which are looked up; the output
    head is, also where it shares the embeddings' weights."""


def measure_size(model: Any) -> Size:
    """Count a model's parameters; of a layer's E routed experts, K are active."""
    idle = sum(idle_parameters(block) for block in moe_blocks(model))
    stored = model.state_dict().keys()
    buffers = [buffer for name, buffer in model.named_buffers() if name in stored]
    total = sum(tensor.numel() for tensor in [*model.parameters(), *buffers])
    matmul = sum(
        parameter.numel()
        for module in text_modules(model)
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() > 1
    )
    return Size(total, total - idle, matmul, matmul - idle)


def flops(matmul_parameters: int) -> int:
    """Floating-point operations per token: each weight is one multiplication and one addition.
    Attention scores are left out: they depend on the context's length."""
    return 2 * matmul_parameters


def idle_parameters(block: MoEBlock) -> int:
    """Of the experts that a token does not select."""
    return int((block.num_experts - block.top_k) * block.expert_parameters)


@torch.no_grad()
def expert_similarity(block: MoEBlock) -> float:
    """Mean cosine of the weights of two experts of a layer, gate, up and down side by side.

    1 for exact copies. The experts of a split hold different neurons in no common order, so their
    weights are near orthogonal, and near 0 is what to expect there. A lone expert has 1.
    """
    number = block.num_experts
    if number == 1:
        return 1.0
    # For unit vectors u, the sum over pairs e ≠ f of u_e · u_f is |Σ u|² − Σ |u|².
    total, lengths = torch.zeros(()), 0.0
    for expert in range(number):
        flat = torch.cat([part.flatten() for part in block.matrices(expert)]).float()
        unit = nn.functional.normalize(flat, dim=0)  # all 0 stays 0
        total = total.to(unit.device) + unit
        lengths += float(unit.square().sum())
    return (float(total.square().sum()) - lengths) / (number * (number - 1))
