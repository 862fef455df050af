"""Gates: routers of experts that are whole models' FFNs, told apart by text.

A gate sees what one layer of the base makes of each expert's passages, and gives each expert a row
[D]. Its logits go through a softmax, so unlike a router's of a split, its scale counts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar, Unpack

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

    def only(self, expert: int) -> "LayerTexts":
        """What is seen of one expert's passages, as if there were no other expert."""
        own = [i for i, passage in enumerate(self.passages) if passage.expert == expert]
        seen = {name: getattr(self, name) for name in ("embedded", "entering", "inputs")}
        return LayerTexts(
            1,
            [replace(self.passages[i], expert=0) for i in own],
            **{name: [each[i] for i in own] for name, each in seen.items() if each},
        )


@dataclass(frozen=True)
class GateRows:
    """A layer's router."""

    rows_ED: Tensor
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """What is kept beside the checkpoint, to make rows for later experts by."""


class MakeRows(Protocol[P]):
    def __call__(self, texts: LayerTexts, params: P, rng: torch.Generator) -> GateRows: ...


class AddRow(Protocol[P]):
    def __call__(self, texts: LayerTexts, before: GateRows, params: P) -> GateRows: ...


Run = Callable[[LayerTexts, Params, torch.Generator], GateRows]


@dataclass(frozen=True)
class Gate(Method[Run]):
    reads: tuple[Reads, ...] = ()
    """The fields of `LayerTexts` that it looks at."""
    note: str = ""
    """What its users should know, if anything."""
    add: Callable[[LayerTexts, GateRows, Any], GateRows] | None = None
    """Makes the row [1, D] of an expert that comes later, the last of the texts', beside the rows
    that there are before; None: as `run` does, of the expert's own passages."""
    add_reads: tuple[Reads, ...] | None = None
    """The fields of `LayerTexts` that it looks at then, if they are others."""

    @property
    def reads_for_more(self) -> tuple[Reads, ...]:
        """The fields of `LayerTexts` that a later expert's row is made from."""
        return self.reads if self.add_reads is None else self.add_reads

    def add_row(self, texts: LayerTexts, before: GateRows, params: Params) -> GateRows:
        """The row [1, D] of an expert that comes later, and all that is then kept beside.

        Args:
            texts: the new expert is the last of them; of the others there may be no passages.
            before: the layer's router, and what was kept beside it.
        """
        if self.add is not None:
            return self.add(texts, before, params)
        return self.run(texts.only(texts.num_experts - 1), params, torch.Generator())


GATES: Registry[Gate] = Registry("gate")


def gate(
    name: str,
    *,
    reads: tuple[Reads, ...],
    note: str = "",
    add: AddRow[Any] | None = None,
    add_reads: tuple[Reads, ...] | None = None,
    **about: Unpack[About],
) -> Callable[[MakeRows[P]], MakeRows[P]]:
    """Register a gate."""
    fields = {"needs_activations": True, "reads": reads, "note": note}
    later = {"add": add, "add_reads": add_reads}
    return registering(GATES, Gate, name=name, **fields, **later, **about)
