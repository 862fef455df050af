"""Which expert each neuron belongs to, learnt through the whole model with its weights as they are.

DOT-MoE's alignment (arXiv:2606.01666; details from a re-implementation: there is no official code),
and ToMoE's aim (arXiv:2501.15316), for a split that is there already. Each neuron has an affinity
to each expert; balanced transport makes a plan of them, rounding it a partition M. A layer puts out
(h * A Mᵀ) downᵀ, with A what each expert counts for a token, and affinities and routers follow the
gradient of the run's losses, straight through both roundings. At the end the neurons move to their
experts: the checkpoint's class and layout stay.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from upcycle.core.transport import partition, straight_through, transport
from upcycle.finetune.gating.base import Gates, Pass
from upcycle.finetune.routers import all_weights
from upcycle.finetune.together import counts, first_parts, put_out
from upcycle.models.blocks import MoEBlock

AFFINITY = "affinity"
"""Name of the parameter [F, E] among a block's experts, F neurons in the order of the experts."""
START = 0.1
"""Affinity to the expert that a neuron is in at first: some tens of steps lead elsewhere."""
ITERATIONS = 50
HOTTEST, COLDEST = 1.0, 0.1
"""Temperatures of the transport in the first and the last step."""


def add_affinities(blocks: Iterable[MoEBlock]) -> None:
    """Let each block's experts have affinities that keep the partition as it is."""
    for block in blocks:
        neurons = block.num_experts * block.experts.down_proj.shape[2]
        owner_F = torch.arange(block.num_experts).repeat_interleave(neurons // block.num_experts)
        affinity_FE = START * nn.functional.one_hot(owner_F, block.num_experts).float()
        device = block.experts.down_proj.device
        block.experts.register_parameter(AFFINITY, nn.Parameter(affinity_FE.to(device)))


@dataclass
class Dealer:
    """Runs the blocks by what is learnt, in place of their classes, and deals the neurons out in
    the end. As a gate, it is told what each expert would count if all ran."""

    blocks: list[MoEBlock]
    score: Callable[[Tensor], Tensor]
    now: Pass | None = None
    """None before the first step."""
    _counts: dict[int, Tensor] = field(default_factory=dict)
    _rounded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By place, which affinities over the temperature were rounded last, and to what."""

    def __post_init__(self) -> None:
        for place, block in enumerate(self.blocks):
            block.experts.forward = self._forward(place)

    def __call__(
        self, place: int, logits_TE: Tensor, chosen_TK: Tensor, weights_TK: Tensor
    ) -> Gates:
        scores_TE = self.score(logits_TE)
        self._counts[place] = all_weights(self.blocks[place], scores_TE, chosen_TK, weights_TK)
        return Gates(chosen_TK, weights_TK, logits_TE)

    @property
    def temperature(self) -> float:
        progress = 0.0 if self.now is None else self.now.progress
        return float(HOTTEST * (COLDEST / HOTTEST) ** progress)

    def held(self, place: int) -> Tensor:
        """1 where an expert of a block holds a neuron, [F, E], else 0; where gradients are wanted,
        with those of the plan."""
        affinity_FE: Tensor = getattr(self.blocks[place].experts, AFFINITY)
        # Rounding takes longer than all else, and micro-batches have one partition.
        cooled_FE = affinity_FE.detach() / self.temperature
        last = self._rounded.get(place)
        same = last is not None and torch.equal(last[0], cooled_FE)
        if last is not None and same and not torch.is_grad_enabled():
            return last[1]
        plan_FE = transport(affinity_FE, self.temperature, ITERATIONS).exp()
        part_FE = last[1] if last is not None and same else partition(plan_FE)
        self._rounded[place] = cooled_FE, part_FE
        return straight_through(part_FE, plan_FE)

    def _forward(self, place: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def forward(x_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
            block = self.blocks[place]
            held_FE = self.held(place)
            on_TE = counts(block, chosen_TK, weights_TK)
            if block.experts.training:
                counts_TE = self._counts[place]
                on_TE = straight_through(on_TE.detach(), counts_TE)
            return put_out(block, x_TD, on_TE @ held_FE.T)

        return forward

    @torch.no_grad()
    def settle(self) -> None:
        """Move the neurons to their experts, and let the classes run again."""
        for place, block in enumerate(self.blocks):
            order_F = self.held(place).argmax(1).argsort(stable=True)
            down_FD = block.experts.down_proj.transpose(1, 2).flatten(0, 1)[order_F]
            shape = block.experts.down_proj.transpose(1, 2).shape
            block.experts.down_proj.copy_(down_FD.view(shape).transpose(1, 2))
            parts = [part_EMD.flatten(0, 1)[order_F] for part_EMD in first_parts(block)]
            block.first.copy_(torch.cat([part_FD.view(shape) for part_FD in parts], dim=1))
            delattr(block.experts, AFFINITY)
            del block.experts.forward
