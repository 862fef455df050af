"""Hidden, averaged: the residual stream over all of a prompt, as mergekit-moe's gate mode.

An expert's row is the mean over its prompts of the mean over their tokens, each prompt counting the
same, minus that over its negative prompts, at unit length.

Departure: mergekit fills prompts up to the length of the longest one and averages what it filled
them with, too, which for prompts of unlike length gives nearly unrelated rows. Here the mean is
over a prompt's own tokens, the beginning-of-sequence token among them.
"""

import torch

from upcycle.core.registry import Params
from upcycle.router_init.gates.base import GateRows, LayerTexts, gate
from upcycle.router_init.gates.hidden import contrasts


@gate(
    "hidden_avg",
    summary="what enters the layer, averaged over the prompts' tokens, positive minus negative",
    paper="mergekit-moe",
    reads=("entering",),
    note="hidden_avg is averaged over the prompts' own tokens: mergekit averages padding, too, so "
    "its rows are others where prompts differ in length",
)
def mean_states(texts: LayerTexts, params: Params, rng: torch.Generator) -> GateRows:
    return GateRows(
        contrasts(texts, [entering_LD.float().mean(0) for entering_LD in texts.entering])
    )
