"""Hidden: the residual stream at a prompt's last token, as mergekit-moe's default gate mode.

An expert's row is the mean over its prompts of what enters the layer, minus that over its negative
prompts, at unit length. The router reads something else, the FFN's normed input, and tokens in the
middle of a text; `text` is fitted on those.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from upcycle.core.registry import Params
from upcycle.router_init.gates.base import GateRows, LayerTexts, gate

FLOOR = 1e-8
"""The least length that a row is divided by."""


@gate(
    "hidden",
    summary="what enters the layer at the prompts' last tokens, positive minus negative",
    paper="mergekit-moe",
    reads=("entering",),
)
def last_states(texts: LayerTexts, params: Params, rng: torch.Generator) -> GateRows:
    return GateRows(contrasts(texts, [entering_LD[-1] for entering_LD in texts.entering]))


def contrasts(texts: LayerTexts, vectors: Sequence[Tensor]) -> Tensor:
    """Unit rows [E, D]: the mean over an expert's passages minus that over its negative ones.

    Args:
        vectors: one [D] per passage.
    """
    rows = []
    for expert in range(texts.num_experts):
        row_D = _mean(vectors, texts.of(expert, negative=False))
        if negatives := texts.of(expert, negative=True):
            row_D = row_D - _mean(vectors, negatives)
        rows.append(row_D)
    return normalize(torch.stack(rows), dim=1, eps=FLOOR)


def _mean(vectors: Sequence[Tensor], places: list[int]) -> Tensor:
    return torch.stack([vectors[place].float() for place in places]).mean(0)
