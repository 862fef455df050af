"""One layer's conversion: from a dense FFN to experts and a router. Tensors in, tensors out."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from upcycle.conversion.compensate import COMPENSATIONS
from upcycle.conversion.plan import Plan
from upcycle.conversion.prune import overall_strength, strongest_neurons
from upcycle.conversion.request import parameters, router_choice
from upcycle.core.innovation import innovations
from upcycle.core.rng import generator
from upcycle.core.types import DenseFFN, ExpertLayout, LayerActivations, MoELayer, Selection, Weigh
from upcycle.models.stream import BATCH_TOKENS
from upcycle.router_init import ROUTERS
from upcycle.split import SPLITS
from upcycle.split.copies import PERTURBS
from upcycle.split.shared import SHARED


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

    @classmethod
    def of_pruned(cls, ffn: DenseFFN, origin_F: Tensor, router_ED: Tensor) -> Self:
        """Pruned copies of equal size, one after the other."""
        experts_EM = torch.arange(len(origin_F)).view(len(router_ED), -1)
        return cls(ffn, ExpertLayout(experts_EM, origin_F[:0]), router_ED, origin_F)

    @property
    def permutation(self) -> Tensor:
        """The dense FFN's neurons, shared first, then expert by expert."""
        return self.origin_F[self.layout.permutation]

    def experts(self, plan: Plan, layer: int) -> MoELayer:
        """What a target writes."""
        shared_S = self.layout.shared_S
        shared = self.ffn.take(shared_S) if len(shared_S) else None
        return MoELayer(self.router_ED, Experts(plan, layer, self.ffn, self.layout), shared)

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


def convert_layer(
    plan: Plan,
    layer: int,
    ffn: DenseFFN,
    activations: LayerActivations | None = None,
    norm_T: Tensor | None = None,
    wanted_TD: Tensor | None = None,
) -> ConvertedLayer:
    """Turn one dense FFN into experts and a router.

    Args:
        ffn: in the source's dtype.
        activations: the same FFN's in float32 on the calibration tokens, if the plan streams them.
        norm_T: of what its output is added to. An error counts relative to it, else a few tokens
            with massive activations would own every fit.
        wanted_TD: the output that would bring the hidden states back to the dense model's, if the
            plan has feedback.
    """
    if activations is None:
        activations = LayerActivations(ffn, ffn.gate_FD.new_empty(0, ffn.hidden_size))
    with torch.no_grad():
        weight_T = _token_weights(norm_T) if plan.compensates and norm_T is not None else None
        if plan.recipe.splits:
            router_ED, layout = _split_layer(plan, layer, activations, weight_T)
        else:
            router_ED, layout = _copy_layer(plan, layer, activations)
        if plan.combine == "sum":
            router_ED = scaled(router_ED, activations.x_TD, plan.router_spread)
        router_ED = router_ED.to("cpu", plan.dtype)
        if plan.recipe.prunes:
            ffn, origin_F = _prune_layer(plan, activations, router_ED, weight_T)
            return ConvertedLayer.of_pruned(ffn, origin_F, router_ED)
        if weight_T is not None:
            selection = layout.selection(router_ED.to(activations.x_TD), plan.weigh)
            y_TD = activations.output()
            if wanted_TD is not None:
                y_TD.lerp_(wanted_TD, plan.feedback)
            ffn = _compensate(plan, activations, selection, y_TD, weight_T)
        if not plan.recipe.copies:
            ffn = ffn.to("cpu", plan.dtype)
    return ConvertedLayer(ffn, layout, router_ED, torch.arange(ffn.num_neurons))


def _split_layer(
    plan: Plan, layer: int, activations: LayerActivations, weight_T: Tensor | None
) -> tuple[Tensor, ExpertLayout]:
    """Take the shared neurons out, cut the rest into experts, fit the router.

    Args:
        weight_T: of the refit that will follow, if one does: what the shared neurons can stand in
            for then counts no more.
    """
    recipe, num_neurons = plan.recipe, activations.ffn.num_neurons
    score_F = torch.zeros(num_neurons)
    if plan.geometry.shared_size:
        params = parameters(SHARED, recipe.shared_by)
        # The split's own randomness, as for the router: all find the same clusters of tokens.
        rng = generator(recipe.seed, "split", layer)
        score_F = SHARED[recipe.shared_by.name].run(activations, plan.geometry, params, rng).cpu()
    order_F = score_F.argsort(descending=True, stable=True)
    shared_S = order_F[: plan.geometry.shared_size].sort().values
    routed_R = order_F[plan.geometry.shared_size :].sort().values
    routed = activations.take(routed_R)
    if weight_T is not None:
        routed = innovations(activations, routed_R, shared_S, weight_T)
    members_EM = SPLITS[recipe.split.name].run(
        routed,
        plan.geometry.num_experts,
        parameters(SPLITS, recipe.split),
        generator(recipe.seed, "split", layer),
    )
    router_ED = _route(plan, generator(recipe.seed, "split", layer), routed, members_EM)
    return router_ED, ExpertLayout(routed_R[members_EM], shared_S)


def _copy_layer(
    plan: Plan, layer: int, activations: LayerActivations
) -> tuple[Tensor, ExpertLayout]:
    """N copies of G shards; a copy's shards share a router row, so they are chosen together
    (NVIDIA's virtual groups, arXiv:2410.07524)."""
    geometry = plan.geometry
    neurons_F = torch.arange(activations.ffn.num_neurons)
    copies_NF = neurons_F.expand(geometry.copies, -1)
    rng = generator(plan.recipe.seed, "router", layer)
    router_ND = _route(plan, rng, activations, copies_NF)
    shards_GM = neurons_F.view(geometry.granularity, -1)
    layout = ExpertLayout(shards_GM.repeat(geometry.copies, 1), neurons_F[:0])
    return router_ND.repeat_interleave(geometry.granularity, dim=0), layout


def _route(
    plan: Plan, rng: torch.Generator, activations: LayerActivations, experts_EM: Tensor
) -> Tensor:
    choice = router_choice(plan.recipe)
    return ROUTERS[choice.name].run(activations, experts_EM, parameters(ROUTERS, choice), rng)


def _prune_layer(
    plan: Plan, activations: LayerActivations, router_ED: Tensor, weight_T: Tensor | None
) -> tuple[DenseFFN, Tensor]:
    """The experts' neurons one after the other, as they will be stored, and where they come from.

    Each expert is pruned and refit for the tokens that it gets by the router as it will be stored.
    """
    x_TD = activations.x_TD
    weight_TE = plan.weigh(x_TD @ router_ED.to(x_TD).T)
    count_T = torch.ones_like(x_TD[:, 0]) if weight_T is None else weight_T
    overall_F = overall_strength(activations, count_T)
    pruned, origins = [], []
    for expert in range(len(router_ED)):
        tokens = weight_TE[:, expert].nonzero()[:, 0]
        own = LayerActivations(activations.ffn, x_TD[tokens])
        neurons_M = strongest_neurons(own, count_T[tokens], overall_F, plan.geometry.expert_size)
        kept = own.take(neurons_M)
        ffn = kept.ffn
        if weight_T is not None:
            selection = _expert_alone(router_ED, plan.weigh, expert)
            ffn = _compensate(plan, kept, selection, own.output(), weight_T[tokens])
        pruned.append(ffn.to("cpu", plan.dtype))
        origins.append(neurons_M.cpu())
    return DenseFFN.concatenate(pruned), torch.cat(origins)


def _expert_alone(router_ED: Tensor, weigh: Weigh, expert: int) -> Selection:
    """What all neurons of one expert count for tokens that get it."""
    return lambda x_TD: weigh(x_TD @ router_ED.to(x_TD).T)[:, expert, None]


def _compensate(
    plan: Plan,
    activations: LayerActivations,
    selection: Selection,
    y_TD: Tensor,
    weight_T: Tensor,
) -> DenseFFN:
    """New weights, given which neurons are on and what they should put out, y."""
    choice = plan.recipe.compensate
    params = parameters(COMPENSATIONS, choice)
    return COMPENSATIONS[choice.name].run(activations, selection, y_TD, weight_T, params)


def _token_weights(norm_T: Tensor) -> Tensor:
    """How much an error on each token counts, 1 on average."""
    # A token whose embedding is zero, such as padding, must not own the fit.
    weight_T = norm_T.float().clamp_min(norm_T.median().item() / 10) ** -2
    return weight_T / weight_T.mean()


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


@dataclass(frozen=True)
class Experts:
    """Makes expert e when asked, so that copies never lie in memory together."""

    plan: Plan
    layer: int
    ffn: DenseFFN
    layout: ExpertLayout

    def __call__(self, expert: int) -> DenseFFN:
        neurons_M = self.layout.experts_EM[expert]
        whole = len(neurons_M) == self.ffn.num_neurons and self.plan.recipe.copies
        ffn = self.ffn if whole else self.ffn.take(neurons_M)
        method = self.plan.recipe.method
        if method.name not in PERTURBS:
            return ffn
        rng = generator(self.plan.recipe.seed, f"perturb expert {expert}", self.layer)
        return PERTURBS[method.name].run(ffn, parameters(PERTURBS, method), rng)
