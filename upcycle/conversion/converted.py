"""A converted layer, and what it is made from. Tensors in, tensors out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from upcycle.conversion.design import Design
from upcycle.conversion.fit.loop import Tell
from upcycle.core.rng import generator
from upcycle.core.types import DenseFFN, ExpertLayout, LayerActivations, MoELayer, Selection, Weigh
from upcycle.models.record.conversion import FitPart
from upcycle.models.stream import BATCH_TOKENS


@dataclass(frozen=True)
class Inputs:
    """What one layer's experts are made from."""

    layer: int
    ffn: DenseFFN
    """In the source's dtype."""
    activations: LayerActivations
    """The same FFN's in float32 on the calibration tokens; on none, if no method looks at them."""
    weight_T: Tensor | None
    """How much an error on each token counts, if weights are refit."""
    wanted_TD: Tensor | None
    """With feedback, the output that would bring the hidden states back to the dense model's."""
    ffns: Sequence[DenseFFN] = ()
    """Of a merge, the experts' own, read one at a time when asked for."""
    gate_ED: Tensor | None = None
    """The router's rows, where text made them; one more than experts, if a shared one has a row."""
    tell: Tell = lambda done, steps: None
    """Told of the steps of a fit."""


@dataclass(frozen=True)
class ConvertedLayer:
    """A dense FFN as experts: whose neurons go where, by which router they are selected."""

    ffn: DenseFFN
    """All neurons in the dense order, of pruned copies expert by expert; but for whole copies, as
    they will be stored."""
    layout: ExpertLayout
    router_ED: Tensor
    origin_F: Tensor
    """Which neuron of the dense FFN each of `ffn`'s comes from."""
    fit: FitPart | None = field(default=None, kw_only=True)
    """What learning it was worth, where there was something to learn."""

    @classmethod
    def of_pruned(cls, ffn: DenseFFN, origin_F: Tensor, router_ED: Tensor) -> Self:
        """Pruned copies of equal size, one after the other."""
        experts_EM = torch.arange(len(origin_F)).view(len(router_ED), -1)
        return cls(ffn, ExpertLayout(experts_EM, origin_F[:0]), router_ED, origin_F)

    @property
    def permutation(self) -> Tensor:
        """The dense FFN's neurons, shared first, then expert by expert."""
        return self.origin_F[self.layout.permutation]

    @property
    def gate(self) -> dict[str, Any]:
        """How well the router tells experts apart, as plain values, where that is a question."""
        return {}

    def experts(self, design: Design, layer: int) -> MoELayer:
        """What a target writes."""
        shared_S = self.layout.shared_S
        shared = self.ffn.take(shared_S) if len(shared_S) else None
        experts = Experts(design, layer, self.ffn, self.layout)
        granularity = design.geometry.granularity
        return MoELayer(self.router_ED, experts, shared, granularity=granularity)

    def output(self, activations: LayerActivations, weigh: Weigh) -> Tensor:
        """A split's output y [T, D] for the inputs of the dense FFN's activations."""
        x_TD = activations.x_TD
        ffn = self.ffn.to(x_TD.device, x_TD.dtype)
        if len(self.permutation) > activations.ffn.num_neurons:
            return self._expert_by_expert(ffn, x_TD, weigh)
        selection = self.layout.selection(self.router_ED.to(x_TD), weigh)
        y_TD = torch.empty_like(x_TD)
        chunks: Iterable[tuple[Tensor, ...]] = activations.chunks(y_TD)
        if not ffn.hides_as(activations.ffn):
            batches = zip(x_TD.split(BATCH_TOKENS), y_TD.split(BATCH_TOKENS), strict=True)
            chunks = ((x_tD, ffn.hidden(x_tD), room_tD) for x_tD, room_tD in batches)
        for x_tD, h_tF, room_tD in chunks:
            torch.matmul(h_tF * selection(x_tD), ffn.down_DF.T, out=room_tD)
        return y_TD

    def _expert_by_expert(self, ffn: DenseFFN, x_TD: Tensor, weigh: Weigh) -> Tensor:
        """The same, where all neurons of all experts on every token would be too many."""
        weight_TE = weigh(x_TD @ self.router_ED.to(x_TD).T)
        y_TD = torch.zeros_like(x_TD)
        for expert, neurons_M in enumerate(self.layout.experts_EM):
            own = ffn.take(neurons_M)
            for tokens in weight_TE[:, expert].nonzero()[:, 0].split(BATCH_TOKENS):
                y_TD[tokens] += weight_TE[tokens, expert, None] * own(x_TD[tokens])
        return y_TD

    def all_on(self) -> DenseFFN:
        """The FFN that all experts together come to: for pruned copies, a wider one."""
        down_DF = self.ffn.down_DF
        return replace(self.ffn, down_DF=down_DF * self.layout.multiplicity.to(down_DF.dtype))


@dataclass(frozen=True)
class Experts:
    """Makes expert e when asked, so that copies never lie in memory together."""

    design: Design
    layer: int
    ffn: DenseFFN
    layout: ExpertLayout

    def __call__(self, expert: int) -> DenseFFN:
        neurons_M = self.layout.experts_EM[expert]
        # Nothing is gathered where an expert is the whole FFN, in its order.
        whole = torch.equal(neurons_M, torch.arange(self.ffn.num_neurons))
        ffn = self.ffn if whole else self.ffn.take(neurons_M)
        perturb = self.design.methods.perturb
        if perturb is None:
            return ffn
        rng = generator(self.design.seed, f"perturb expert {expert}", self.layer)
        changed: DenseFFN = perturb.run(ffn, perturb.params, rng)
        return changed


def route(
    design: Design, routed: LayerActivations, experts_EM: Tensor, rng: torch.Generator
) -> Tensor:
    """The router's rows, [E, D]."""
    router = design.methods.router
    rows_ED: Tensor = router.run(routed, experts_EM, router.params, rng)
    return rows_ED


def stored(design: Design, inputs: Inputs, router_ED: Tensor) -> Tensor:
    """The router as it is written: of the design's spread, where its weights are not averages."""
    if design.combine == "sum":
        router_ED = scaled(router_ED, inputs.activations.x_TD, design.router_spread)
    return router_ED.to("cpu", design.dtype)


def scaled(router_ED: Tensor, x_TD: Tensor, spread: float) -> Tensor:
    """The router scaled so that a token's logits have this standard deviation on average.

    What all rows have in common is taken out first: it shifts a token's logits together, which
    selects nothing, and would cost precision below float32 and equal weights under a sigmoid.

    Args:
        x_TD: calibration inputs, by which the spread is measured.
    """
    router_ED = router_ED - router_ED.mean(0)
    logits_TE = x_TD.float() @ router_ED.to(x_TD.device).float().T
    measured = logits_TE.std(dim=1, correction=0).mean().item()
    return router_ED * (spread / measured if measured > 0 else spread)


def refit(
    design: Design,
    activations: LayerActivations,
    selection: Selection,
    y_TD: Tensor,
    weight_T: Tensor,
) -> DenseFFN:
    """New weights, given what each neuron counts and what they should put out, y."""
    compensate = design.methods.compensate
    ffn: DenseFFN = compensate.run(activations, selection, y_TD, weight_T, compensate.params)
    return ffn


def token_weights(norm_T: Tensor) -> Tensor:
    """How much an error on each token counts, 1 on average."""
    # A token whose embedding is zero, such as padding, must not own the fit.
    weight_T = norm_T.float().clamp_min(norm_T.median().item() / 10) ** -2
    return weight_T / weight_T.mean()
