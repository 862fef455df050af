"""A merge's routers: from the experts' passages, layer by layer, by the gate that was chosen."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upcycle.core.binding import Bound
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
        texts = self._texts(self.gate.method.reads, entering_TD, x_TD)
        made: GateRows = self.gate.run(texts, self.gate.params, rng)
        return made

    def added(
        self, before: GateRows, entering_TD: Tensor | None = None, x_TD: Tensor | None = None
    ) -> GateRows:
        """The row [1, D] of the last expert beside those of one layer that there are.

        Args:
            before: the others', and what was kept beside them.
            entering_TD, x_TD: as `rows` takes them, if the gate reads them.

        Raises:
            UpcycleError: the expert has no passage, or none with text.
        """
        method = self.gate.method
        texts = self._texts(method.reads_for_more, entering_TD, x_TD)
        return method.add_row(texts, before, self.gate.params)

    def _texts(
        self, reads: Collection[str], entering_TD: Tensor | None, x_TD: Tensor | None
    ) -> LayerTexts:
        def of_passages(name: str, rows_TD: Tensor | None) -> Sequence[Tensor]:
            return self.grouped.ungroup(rows_TD) if name in reads and rows_TD is not None else ()

        return LayerTexts(
            self.num_experts,
            self.grouped.passages,
            embedded=self._embedded() if "embedded" in reads else (),
            entering=of_passages("entering", entering_TD),
            inputs=of_passages("inputs", x_TD),
            losses=self.losses,
        )

    def _embedded(self) -> list[Tensor]:
        if self.embed_VD is None:
            raise ValueError(f"the gate {self.gate.name} reads embeddings")
        return [self.embed_VD[passage.ids_L] for passage in self.grouped.passages]
