"""Gates: routers of experts that are whole models' FFNs, told apart by text.

A gate sees what one layer of the base makes of each expert's passages, and gives each expert a row
[D]. Its logits go through a softmax, so unlike a router's of a split, its scale counts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, Unpack

import torch
from torch import Tensor

from upcycle.core.errors import UpcycleError
from upcycle.core.passages import Passage
from upcycle.core.registry import About, Method, Params, Registry, registering

P = TypeVar("P", bound=Params, contravariant=True)
Reads = Literal["embedded", "entering", "inputs", "losses"]
"""The fields of `LayerTexts` that a gate may ask for."""


@dataclass(frozen=True)
class LayerTexts:
    """What one layer sees of the passages; in every list one tensor per passage, in their order.
    What a gate does not ask for may be left empty."""

    num_experts: int
    passages: Sequence[Passage]
    embedded: Sequence[Tensor] = ()
    """The rows of the embeddings, [L, D], before any scaling."""
    entering: Sequence[Tensor] = ()
    """The residual stream that enters the layer, [L, D]."""
    inputs: Sequence[Tensor] = ()
    """What the layer's FFN, and so its router, reads, [L, D]."""
    losses: Sequence[Tensor] = ()
    """The loss of each expert's model on the next token, in nats, [L - 1, E]."""

    def of(self, expert: int, *, negative: bool) -> list[int]:
        """The places of an expert's passages.

        Raises:
            UpcycleError: it has none that are its own.
        """
        wanted = (expert, negative)
        found = [i for i, p in enumerate(self.passages) if (p.expert, p.negative) == wanted]
        if not found and not negative:
            raise UpcycleError(
                f"expert {expert} has neither prompts nor text, by which its row of the router is "
                "made: give it some, or a random router"
            )
        return found


@dataclass(frozen=True)
class GateRows:
    """A layer's router."""

    rows_ED: Tensor
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """What is kept beside the checkpoint, to make rows for later experts by."""


class MakeRows(Protocol[P]):
    def __call__(self, texts: LayerTexts, params: P, rng: torch.Generator) -> GateRows: ...


Run = Callable[[LayerTexts, Params, torch.Generator], GateRows]


@dataclass(frozen=True)
class Gate(Method[Run]):
    reads: tuple[Reads, ...] = ()
    """The fields of `LayerTexts` that it looks at."""
    note: str = ""
    """What its users should know, if anything."""


GATES: Registry[Gate] = Registry("gate")


def gate(
    name: str, *, reads: tuple[Reads, ...], note: str = "", **about: Unpack[About]
) -> Callable[[MakeRows[P]], MakeRows[P]]:
    """Register a gate."""
    fields = {"needs_activations": True, "reads": reads, "note": note}
    return registering(GATES, Gate, name=name, **fields, **about)
