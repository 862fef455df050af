"""Split: cut each FFN's neurons into experts, beside neurons that are always on.

The FFN is a sum over neurons, so all experts together are the FFN; what a token leaves out is lost,
and a refit makes up for part of it.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from upcycle.conversion.converted import ConvertedLayer, Inputs, refit, route, stored
from upcycle.conversion.design import Bound, Design, Methods
from upcycle.conversion.geometry import split_geometry
from upcycle.conversion.recipe import Recipe
from upcycle.conversion.ways.base import WAYS, Exact, Room, Way, check_no_copies
from upcycle.core.errors import UpcycleError
from upcycle.core.innovation import innovations
from upcycle.core.rng import generator
from upcycle.core.types import DenseFFN, ExpertLayout, Geometry
from upcycle.models.targets.base import MoETarget


class Split(Way):
    name = "split"
    default_router = "ridge"
    takes_feedback = True
    fewer = "faster"

    def check(self, recipe: Recipe, methods: Methods) -> None:
        check_no_copies(recipe)
        if recipe.shared == 1:
            raise UpcycleError("`shared=1` leaves nothing to route: give less")

    def geometry(self, recipe: Recipe, room: Room) -> Geometry:
        return split_geometry(
            recipe,
            room.num_neurons,
            room.layers,
            room.num_dense,
            shared_width=room.shared_width,
            min_experts=room.min_experts,
        )

    def make(self, design: Design, inputs: Inputs) -> ConvertedLayer:
        activations, weight_T = inputs.activations, inputs.weight_T
        router_ED, layout = self._cut(design, inputs)
        router_ED = stored(design, inputs, router_ED)
        ffn = inputs.ffn
        if weight_T is not None:
            selection = layout.selection(router_ED.to(activations.x_TD), design.weigh)
            y_TD = activations.output()
            if inputs.wanted_TD is not None:
                y_TD.lerp_(inputs.wanted_TD, design.feedback)
            ffn = refit(design, activations, selection, y_TD, weight_T)
        ffn = ffn.to("cpu", design.dtype)
        return ConvertedLayer(ffn, layout, router_ED, torch.arange(ffn.num_neurons))

    def _cut(self, design: Design, inputs: Inputs) -> tuple[Tensor, ExpertLayout]:
        """Take the shared neurons out, cut the rest into experts, fit the router."""
        methods, geometry = design.methods, design.geometry
        activations, weight_T = inputs.activations, inputs.weight_T
        # One stream for all three, which so find the same clusters of tokens.
        stream = (design.seed, "split", inputs.layer)
        score_F = torch.zeros(activations.ffn.num_neurons)
        if geometry.shared_size:
            by = methods.shared_by
            score_F = by.run(activations, geometry, by.params, generator(*stream)).cpu()
        order_F = score_F.argsort(descending=True, stable=True)
        shared_S = order_F[: geometry.shared_size].sort().values
        routed_R = order_F[geometry.shared_size :].sort().values
        routed = activations.take(routed_R)
        if weight_T is not None:  # what the shared neurons can stand in for then counts no more
            routed = innovations(activations, routed_R, shared_S, weight_T)
        split = methods.split
        members_EM = split.run(routed, geometry.num_experts, split.params, generator(*stream))
        router_ED = route(design, routed, members_EM, generator(*stream))
        return router_ED, ExpertLayout(routed_R[members_EM], shared_S)

    def exact(self, recipe: Recipe, design: Design) -> Exact:
        return "all on"

    def partitions(self, methods: Methods) -> bool:
        return methods.split.method.partitions

    def kept_neurons(self, geometry: Geometry) -> int:
        return geometry.num_neurons

    def take_up(
        self, design: Design, ffn: DenseFFN, permutation: Tensor, router_ED: Tensor, refit: Any
    ) -> ConvertedLayer:
        geometry = design.geometry
        layout = ExpertLayout.of_permutation(
            permutation, geometry.shared_size, geometry.num_experts
        )
        origin_F = torch.arange(ffn.num_neurons)
        return ConvertedLayer(replace(ffn, **refit), layout, router_ED, origin_F)

    def used(self, methods: Methods, geometry: Geometry) -> dict[str, Bound[Any]]:
        used: dict[str, Bound[Any]] = {"router": methods.router, "split": methods.split}
        return used | ({"shared_by": methods.shared_by} if geometry.shared_size else {})

    def usage(self, geometry: Geometry) -> str:
        each = f"{100 * geometry.expert_size / geometry.num_neurons:.1f}"
        shared = f" and the {100 * geometry.shared_ratio:.0f} % that are always on"
        return (
            f"A token uses {100 * geometry.active_ratio:.0f} % of each FFN: {geometry.top_k} of "
            f"{geometry.num_experts} experts, {each} % each"
            f"{shared if geometry.shared_size else ''}."
        )

    def made(self, design: Design) -> str:
        methods = design.methods
        shared = f", shared by {methods.shared_by.name}" if design.geometry.shared_size else ""
        return f"split by {methods.split.name}{shared}, router {methods.router.name}"

    def card(self, design: Design) -> str:
        geometry = design.geometry
        shared = f", beside a shared expert of {geometry.shared_size} that are always on"
        repeats = (
            "\nThese experts may hold the same neuron, and some neurons of the dense model are in "
            "none."
        )
        return (
            f"Every layer's FFN was cut into {geometry.num_experts} experts of "
            f"{geometry.expert_size} neurons, of which {geometry.top_k} are active per token"
            f"{shared if geometry.shared_size else ''}."
            f"{'' if self.partitions(design.methods) else repeats}"
        )

    def notes(
        self, recipe: Recipe, design: Design, target: MoETarget, hosts: Collection[str]
    ) -> Iterator[str]:
        geometry = design.geometry
        if geometry.top_k == geometry.num_experts:
            yield "top_k is all experts: nothing is switched off, nothing is saved"


WAYS.add("split", Split())
