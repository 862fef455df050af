"""Prune: every expert is a copy of the FFN, less the neurons that its own tokens use least.

Between a split and whole copies: a neuron that many tokens need is in many experts, so the model
grows, and a token still runs a part of the FFN only. Experts made by pruning copies for different
text are DIVE's (arXiv:2506.09351); there the text's domain tells experts apart, here a router on
hidden states does, layer by layer.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from upcycle.conversion.converted import ConvertedLayer, Inputs, refit, route, stored
from upcycle.conversion.design import Design, Methods
from upcycle.conversion.geometry import pruned_geometry
from upcycle.conversion.recipe import Recipe
from upcycle.conversion.ways.base import (
    WAYS,
    Exact,
    Fitting,
    Room,
    Way,
    check_alike,
    check_no_copies,
    check_no_fit,
)
from upcycle.core.errors import UpcycleError
from upcycle.core.rng import generator
from upcycle.core.types import (
    DenseFFN,
    Geometry,
    LayerActivations,
    Selection,
    Weigh,
    evenly,
    sampled,
)

ALL_TOKENS = 1e-3
"""Weight of all tokens beside an expert's own: it ranks the neurons that those do not use."""
RANKING_TOKENS = 16384
"""How many of all tokens are looked at for that."""


class Prune(Way):
    name = "prune"
    default_router = "membership"
    void = ("split", "shared_by")
    fewer = "smaller"

    def check(self, recipe: Recipe, methods: Methods) -> None:
        check_alike(recipe, methods)
        check_no_copies(recipe)
        check_no_fit(recipe)
        if recipe.top_k not in (None, 1):
            raise UpcycleError(
                f"`top_k={recipe.top_k}` goes with a split or copies: a token takes one pruned "
                "copy, which stands for the whole FFN"
            )

    def geometry(self, recipe: Recipe, room: Room) -> Geometry:
        return pruned_geometry(recipe, room.num_neurons, room.layers, room.num_dense)

    def make(self, design: Design, inputs: Inputs) -> ConvertedLayer:
        neurons_F = torch.arange(inputs.ffn.num_neurons)
        copies_EF = neurons_F.expand(design.geometry.num_experts, -1)
        rng = generator(design.seed, "router", inputs.layer)
        router_ED = route(design, inputs.activations, copies_EF, rng)
        router_ED = stored(design, inputs, router_ED)
        ffn, origin_F = self._prune(design, inputs, router_ED)
        return ConvertedLayer.of_pruned(ffn, origin_F, router_ED)

    def _prune(self, design: Design, inputs: Inputs, router_ED: Tensor) -> tuple[DenseFFN, Tensor]:
        """The experts' neurons one after the other, as they will be stored, and where they come
        from. Each expert is pruned and refit for the tokens that it gets by the router as stored.
        """
        activations, weight_T = inputs.activations, inputs.weight_T
        x_TD = activations.x_TD
        weight_TE = design.weigh(x_TD @ router_ED.to(x_TD).T)
        count_T = torch.ones_like(x_TD[:, 0]) if weight_T is None else weight_T
        overall_F = overall_strength(activations, count_T)
        pruned, origins = [], []
        for expert in range(len(router_ED)):
            tokens = weight_TE[:, expert].nonzero()[:, 0]
            own = LayerActivations(activations.ffn, x_TD[tokens])
            size = design.geometry.expert_size
            neurons_M = strongest_neurons(own, count_T[tokens], overall_F, size)
            kept = own.take(neurons_M)
            ffn = kept.ffn
            if weight_T is not None:
                selection = _expert_alone(router_ED, design.weigh, expert)
                ffn = refit(design, kept, selection, own.output(), weight_T[tokens])
            pruned.append(ffn.to("cpu", design.dtype))
            origins.append(neurons_M.cpu())
        return DenseFFN.concatenate(pruned), torch.cat(origins)

    def exact(self, recipe: Recipe, design: Design) -> Exact:
        return "all on"

    def kept_neurons(self, geometry: Geometry) -> int:
        return geometry.num_experts * geometry.expert_size

    def take_up(
        self, design: Design, ffn: DenseFFN, permutation: Tensor, router_ED: Tensor, refit: Any
    ) -> ConvertedLayer:
        pruned = replace(ffn.take(permutation), **refit)
        return ConvertedLayer.of_pruned(pruned, permutation, router_ED)

    def fitting(self, geometry: Geometry, tokens: int) -> Fitting:
        """Of a pruned copy only its own neurons are refit, on its own tokens: twice its share,
        perhaps."""
        own = min(tokens, 2 * tokens // geometry.num_experts)
        return Fitting(
            neurons=geometry.expert_size,
            tokens=own,
            at_once=max(own, sampled(tokens, RANKING_TOKENS)),
            kept=self.kept_neurons(geometry),
        )

    def usage(self, geometry: Geometry) -> str:
        return (
            f"A token uses {100 * geometry.active_ratio:.0f} % of each FFN: {geometry.top_k} of "
            f"{geometry.num_experts} pruned copies."
        )

    def made(self, design: Design) -> str:
        return f"pruned copies, router {design.methods.router.name}"

    def card(self, design: Design) -> str:
        geometry = design.geometry
        return (
            f"Every layer's FFN was copied into {geometry.num_experts} experts, each pruned to the "
            f"{geometry.expert_size} of {geometry.num_neurons} neurons that put out most on its "
            "own tokens; one is active per token."
        )


WAYS.add("prune", Prune())


def mean_strength(activations: LayerActivations, weight_T: Tensor) -> Tensor:
    """How much each neuron puts out on average, h² |down|², [F]; zero without tokens.

    Args:
        weight_T: how much each token counts.
    """
    power_F = activations.ffn.down_DF.square().sum(0)
    energy_F = torch.zeros_like(power_F)
    for _, h_tF, weight_t in activations.chunks(weight_T):
        energy_F += weight_t @ h_tF.square()
    return energy_F * power_F / max(1, len(weight_T))


def overall_strength(activations: LayerActivations, weight_T: Tensor) -> Tensor:
    """The same on a sample of all tokens."""
    sample = activations.sample(RANKING_TOKENS)
    return mean_strength(sample, evenly(weight_T, RANKING_TOKENS))


def strongest_neurons(
    own: LayerActivations, weight_T: Tensor, overall_F: Tensor, size: int
) -> Tensor:
    """The neurons that put out most on an expert's own tokens, [M], ascending.

    Args:
        weight_T: how much each token counts.
        overall_F: the neurons' mean strength on all tokens.
        size: M.
    """
    strength_F = mean_strength(own, weight_T) + ALL_TOKENS * overall_F
    return strength_F.topk(size).indices.sort().values


def _expert_alone(router_ED: Tensor, weigh: Weigh, expert: int) -> Selection:
    """What all neurons of one expert count for tokens that get it."""
    return lambda x_TD: weigh(x_TD @ router_ED.to(x_TD).T)[:, expert, None]
