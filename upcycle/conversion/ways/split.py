"""Split: cut each FFN's neurons into experts, beside neurons that are always on.

The FFN is a sum over neurons, so all experts together are the FFN; what a token leaves out is lost,
and a refit makes up for part of it.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from upcycle.conversion.converted import ConvertedLayer, Inputs, refit, route, scaled, stored
from upcycle.conversion.design import Design, Methods
from upcycle.conversion.fit.base import Experts
from upcycle.conversion.fit.learn import idle, learn
from upcycle.conversion.geometry import split_geometry
from upcycle.conversion.recipe import Recipe
from upcycle.conversion.ways.base import WAYS, Exact, Room, Way, check_no_copies
from upcycle.core.binding import Bound
from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.innovation import innovations
from upcycle.core.rng import generator
from upcycle.core.types import DenseFFN, ExpertLayout, Geometry, LayerActivations
from upcycle.models.record.conversion import FitPart
from upcycle.models.targets.base import MoETarget


class Split(Way):
    name = "split"
    default_router = "ridge"
    void = ()
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
            most_top_k=room.most_top_k,
        )

    def make(self, design: Design, inputs: Inputs) -> ConvertedLayer:
        shared_S, routed_R = self._shared(design, inputs)
        experts, part = self._cut(design, inputs, shared_S, routed_R)
        layout = ExpertLayout(routed_R[experts.experts_EM.cpu()], shared_S)
        router_ED = stored(design, inputs, experts.router_ED)
        learned = None
        if design.methods.fit.method.refits:
            routed_R = routed_R.to(inputs.activations.x_TD.device)
            learned = inputs.activations.ffn.put(routed_R, experts.ffn)
        ffn = self._weights(design, inputs, layout, router_ED, learned).to("cpu", design.dtype)
        return ConvertedLayer(ffn, layout, router_ED, torch.arange(ffn.num_neurons), fit=part)

    def _shared(self, design: Design, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Neurons that are always on, [S], and the others, [R], ascending."""
        activations, geometry = inputs.activations, design.geometry
        score_F = torch.zeros(activations.ffn.num_neurons)
        if geometry.shared_size:
            by, rng = design.methods.shared_by, self._rng(design, inputs)
            score_F = by.run(activations, geometry, by.params, rng).cpu()
        order_F = score_F.argsort(descending=True, stable=True)
        shared_S = order_F[: geometry.shared_size].sort().values
        return shared_S, order_F[geometry.shared_size :].sort().values

    def _rng(self, design: Design, inputs: Inputs) -> torch.Generator:
        """One stream for shared neurons, split and router, which so find the same clusters of
        tokens."""
        return generator(design.seed, "split", inputs.layer)

    def _cut(
        self, design: Design, inputs: Inputs, shared_S: Tensor, routed_R: Tensor
    ) -> tuple[Experts, FitPart | None]:
        """Cut the routed neurons into experts, fit the router, and let them learn."""
        activations, weight_T = inputs.activations, inputs.weight_T
        routed = own = activations.take(routed_R)
        if design.compensates and weight_T is not None:
            # What the shared neurons can stand in for then counts no more.
            routed = innovations(activations, routed_R, shared_S, weight_T)
        split = design.methods.split
        count = design.geometry.num_experts
        members_EM = split.run(routed, count, split.params, self._rng(design, inputs))
        router_ED = route(design, routed, members_EM, self._rng(design, inputs))
        if not design.fits:
            return Experts(own.ffn, members_EM, router_ED), None
        seen = own if design.methods.fit.method.refits else routed
        return self._learn(design, inputs, seen, Experts(seen.ffn, members_EM, router_ED))

    def _learn(
        self, design: Design, inputs: Inputs, routed: LayerActivations, experts: Experts
    ) -> tuple[Experts, FitPart | None]:
        fit, x_TD = design.methods.fit, routed.x_TD
        spread_ED = scaled(experts.router_ED, x_TD, 1.0).to(x_TD)
        start = Experts(experts.ffn, experts.experts_EM, spread_ED)
        weight_T = torch.ones_like(x_TD[:, 0]) if inputs.weight_T is None else inputs.weight_T
        rng, top_k = generator(design.seed, "fit", inputs.layer), design.geometry.top_k
        return learn(fit.method, fit.params, start, routed, weight_T, top_k, rng, inputs.tell)

    def _weights(
        self,
        design: Design,
        inputs: Inputs,
        layout: ExpertLayout,
        router_ED: Tensor,
        learned: DenseFFN | None,
    ) -> DenseFFN:
        """What all neurons come to have: the dense FFN's weights, or learned ones, refit if that is
        asked for."""
        activations, weight_T = inputs.activations, inputs.weight_T
        if not design.compensates or weight_T is None:
            return learned or inputs.ffn
        y_TD = activations.output()
        if inputs.wanted_TD is not None:
            y_TD.lerp_(inputs.wanted_TD, design.feedback)
        if learned is not None:
            activations = LayerActivations(learned, activations.x_TD)
        selection = layout.selection(router_ED.to(activations.x_TD), design.weigh)
        return refit(design, activations, selection, y_TD, weight_T)

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
        used |= {"shared_by": methods.shared_by} if geometry.shared_size else {}
        return used | ({"fit": methods.fit} if methods.fit.method.learns else {})

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
        fit = f", fit {methods.fit.name}" if design.fits else ""
        return f"split by {methods.split.name}{shared}, router {methods.router.name}{fit}"

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
        rule = recipe.shared_by
        if not geometry.shared_size and rule != Recipe.model_fields["shared_by"].default:
            yield f"{setting('shared_by', rule)} changes nothing here: no neuron is shared"
        why = idle(recipe.calibration_tokens, geometry.top_k, geometry.num_experts)
        if design.fits and why:
            yield f"{setting('fit', design.methods.fit.name)} changes nothing here: {why}"


WAYS.add("split", Split())
