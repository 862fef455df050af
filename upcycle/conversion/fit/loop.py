"""The loop by which a layer learns: tensors follow the gradient of a loss, by Adam.

Only one layer is in memory, and no gradient goes through another.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

B = TypeVar("B")
Tell = Callable[[int, int], None]
"""Told how many of all steps are done."""

BATCH = 512  # tokens a step
WARM_UP = 10  # steps
BETAS = (0.9, 0.95)


@torch.enable_grad()
def follow(
    rates: Sequence[tuple[Tensor, float]],
    batches: Iterable[B],
    loss: Callable[[B], Tensor],
    steps: int,
    tell: Tell = lambda done, steps: None,
) -> None:
    """Change tensors in place, a step per batch.

    Args:
        rates: the tensors, each with the size of its first steps, which falls linearly to zero.
        batches: as many as there are steps.
    """
    tensors = [tensor.requires_grad_() for tensor, _ in rates]
    groups = [{"params": tensor, "lr": rate} for tensor, rate in rates]
    optimiser = torch.optim.Adam(groups, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / (steps + 1))
    )
    for step, batch in enumerate(batches):
        tell(step, steps)
        optimiser.zero_grad()
        loss(batch).backward()
        optimiser.step()
        schedule.step()
    tell(steps, steps)
    for tensor in tensors:
        tensor.requires_grad_(False)


def unit_step(matrix: Tensor) -> float:
    """The unit that rates of a matrix [rows, inputs] are in, its root mean square / √inputs: Adam's
    steps have none, and outputs of wide rows would otherwise move the more (μP, arXiv:2203.03466).
    """
    return matrix.detach().square().mean().sqrt().item() / math.sqrt(matrix.shape[1])
