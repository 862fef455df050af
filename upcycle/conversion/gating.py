"""A merge's routers: from the experts' passages, layer by layer, by the gate that was chosen."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upcycle.conversion.design import Bound
from upcycle.models.passages import Grouped
from upcycle.router_init.gates.base import Gate, GateRows, LayerTexts


@dataclass(frozen=True)
class Gating:
    """Makes each layer's router of what a stream of `grouped.groups` sees there."""

    gate: Bound[Gate]
    num_experts: int
    grouped: Grouped
    embed_VD: Tensor | None = None
    """The base's embeddings, if the gate reads them."""
    losses: Sequence[Tensor] = ()
    """Of each expert's model on the passages, [L - 1, E] each, if the gate reads them."""

    def rows(self, entering_TD: Tensor, x_TD: Tensor, rng: torch.Generator) -> GateRows:
        """One layer's router.

        Args:
            entering_TD: the residual stream that enters the layer (`HiddenStream.entering`).
            x_TD: what its FFN reads (`HiddenStream.attend`).

        Raises:
            UpcycleError: an expert has no passage, or none with text.
        """
        reads = self.gate.method.reads
        texts = LayerTexts(
            self.num_experts,
            self.grouped.passages,
            embedded=self._embedded() if "embedded" in reads else (),
            entering=self.grouped.ungroup(entering_TD) if "entering" in reads else (),
            inputs=self.grouped.ungroup(x_TD) if "inputs" in reads else (),
            losses=self.losses,
        )
        made: GateRows = self.gate.run(texts, self.gate.params, rng)
        return made

    def _embedded(self) -> list[Tensor]:
        if self.embed_VD is None:
            raise ValueError(f"the gate {self.gate.name} reads embeddings")
        return [self.embed_VD[passage.ids_L] for passage in self.grouped.passages]
