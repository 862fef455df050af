"""Cheap: the embeddings of the prompts' tokens, the same in every layer, as mergekit-moe's mode.

An expert's row is the sum over all tokens of all its prompts at unit length, minus that of its
negative prompts, again at unit length.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from upcycle.core.registry import Params
from upcycle.router_init.gates.base import GateRows, LayerTexts, gate
from upcycle.router_init.gates.hidden import FLOOR


@gate(
    "cheap_embed",
    summary="embeddings of the prompts' tokens, positive minus negative, the same in all layers",
    paper="mergekit-moe",
    reads=("embedded",),
)
def summed_embeddings(texts: LayerTexts, params: Params, rng: torch.Generator) -> GateRows:
    def direction(places: list[int]) -> Tensor:
        sums = [texts.embedded[place].float().sum(0) for place in places]
        return normalize(torch.stack(sums).sum(0), dim=0, eps=FLOOR)

    rows = []
    for expert in range(texts.num_experts):
        row_D = direction(texts.of(expert, negative=False))
        if negatives := texts.of(expert, negative=True):
            row_D = row_D - direction(negatives)
        rows.append(row_D)
    return GateRows(normalize(torch.stack(rows), dim=1, eps=FLOOR))
