"""The experts' texts to measure on: windows that the router was not fitted on, one kind a text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upcycle.conversion.merging.passages import fitted_windows
from upcycle.conversion.merging.request import Merge
from upcycle.conversion.plan import Plan
from upcycle.models.calibration import CHECK_WINDOW
from upcycle.models.tokens import Reader, open_reader

MIXED = "mixed"
"""The kind of text in which the experts' texts alternate within a window."""


@dataclass(frozen=True)
class OwnTexts:
    """What to measure a merge on beside what it is made of."""

    windows: Mapping[str, Tensor]
    """By text, tokens [W, L]."""
    left_out: tuple[str, ...] = ()
    """Texts of which no window is left."""


def own_texts(plan: Plan) -> OwnTexts:
    """Windows of the experts' texts, and of all of them mixed; none without a check.

    Raises:
        UpcycleError: a text can't be read.
    """
    merge, names = plan.design.merge, plan.own_texts
    if merge is None or not names or not plan.check_windows:
        return OwnTexts({})
    reader = open_reader(plan.source.folder, plan.source.config.vocab_size)
    bodies = {name: _bodies(plan, merge, reader, name) for name in names}
    found = {name: bodies_WT for name, bodies_WT in bodies.items() if len(bodies_WT)}
    left_out = tuple(name for name in bodies if name not in found)
    if len(found) > 1:
        found[MIXED] = mixed(list(found.values()))
    return OwnTexts({name: reader.begun(ids_WT) for name, ids_WT in found.items()}, left_out)


def _bodies(plan: Plan, merge: Merge, reader: Reader, text: str) -> Tensor:
    """At most as many windows as the check reads of each kind of text, without what begins each."""
    recipe, gate = plan.recipe, plan.design.methods.gate
    length, part = reader.body(recipe.seq_len), reader.body(min(recipe.seq_len, CHECK_WINDOW))
    ids_BT = reader.held_back(
        text,
        fitted_windows(merge, recipe, gate.name if gate else ""),
        -(-plan.check_windows * part // length),
        length,
        seed=recipe.seed,
    )
    whole = ids_BT.numel() // part * part
    return ids_BT.flatten()[:whole].view(-1, part)[: plan.check_windows]


def mixed(texts: Sequence[Tensor]) -> Tensor:
    """Windows [W, T] of one piece of each text, of as many as all of them have; which comes first
    changes from window to window."""
    count = len(texts)
    pieces = [text_WT.tensor_split(count, 1) for text_WT in texts]
    turns = [
        torch.cat([pieces[(place + window) % count][place][window] for place in range(count)])
        for window in range(min(map(len, texts)))
    ]
    return torch.stack(turns)
