"""Merge: every expert is the FFN of another model, a fine-tune of one base.

Experts are averaged, as copies are; what is no FFN comes from the base. A shared expert, if there
is one, is added to the mean, by a gate of its own where that has prompts.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from upcycle.conversion.converted import ConvertedLayer, Inputs, route, stored
from upcycle.conversion.design import Design, Methods
from upcycle.conversion.geometry import merged_geometry
from upcycle.conversion.merging.request import RANDOM, Expert, Merge
from upcycle.conversion.recipe import Recipe
from upcycle.conversion.ways.base import WAYS, Exact, Room, Way, check_no_copies, check_no_fit
from upcycle.core.binding import Bound
from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.rng import generator
from upcycle.core.types import DenseFFN, ExpertLayout, Geometry, MoELayer
from upcycle.evaluation.gates import gate_facts
from upcycle.models.targets.base import MoETarget
from upcycle.router_init.gates import GATES


@dataclass(frozen=True)
class MergedLayer(ConvertedLayer):
    """A layer whose experts are other models' FFNs, made when they are written."""

    make: Callable[[int], DenseFFN]
    """The experts in order, the shared one last."""
    shared: bool
    shared_gate_1D: Tensor | None

    @property
    def gate(self) -> dict[str, Any]:
        return gate_facts(self.router_ED)

    def experts(self, design: Design, layer: int) -> MoELayer:
        shared = self.make(len(self.router_ED)) if self.shared else None
        return MoELayer(self.router_ED, self.make, shared, self.shared_gate_1D)


class MergeWay(Way):
    name = "merge"
    default_router = "normal"
    lossy = False
    averages = True
    several = True
    softmax_rows = True
    changed = "its experts are other models' FFNs"

    def check(self, recipe: Recipe, methods: Methods) -> None:
        check_no_copies(recipe)
        check_no_fit(recipe)
        if methods.gate is None and not methods.router.method.tells_copies_apart:
            raise UpcycleError(
                f"{setting('router', methods.router.name)} tells parts of one FFN apart, not "
                f"models: use {' or '.join([*GATES, *RANDOM])}"
            )
        if recipe.compensate.name != "none" or recipe.active is not None:
            field = "active" if recipe.active is not None else "compensate"
            raise UpcycleError(
                f"{setting(field, getattr(recipe, field))} goes with a split: a merge keeps every "
                "FFN whole"
            )
        if recipe.keep_dense == "auto":
            raise UpcycleError("`keep_dense=auto` goes with a split: name layers, or none")
        if recipe.shared not in (None, 0, 1):
            raise UpcycleError(
                f"`shared={recipe.shared:g}` goes with a split: a merge shares a whole FFN"
            )

    def geometry(self, recipe: Recipe, room: Room) -> Geometry:
        return merged_geometry(recipe, room.num_neurons)

    def make(self, design: Design, inputs: Inputs) -> ConvertedLayer:
        merge, geometry = _of(design), design.geometry
        neurons_F = torch.arange(inputs.ffn.num_neurons)
        copies_EF = neurons_F.expand(geometry.num_experts, -1)
        if inputs.gate_ED is None:
            rng = generator(design.seed, "router", inputs.layer)
            rows_ED = route(design, inputs.activations, copies_EF, rng)
        else:
            rows_ED = inputs.gate_ED
        rows_ED = stored(design, inputs, rows_ED)
        router_ED, rest_1D = rows_ED.split([len(copies_EF), len(rows_ED) - len(copies_EF)])
        return MergedLayer(
            inputs.ffn,
            ExpertLayout(copies_EF, neurons_F[:0]),
            router_ED,
            neurons_F,
            make=Scaled(merge.all, inputs.ffns, design.seed, inputs.layer),
            shared=merge.shared is not None,
            shared_gate_1D=rest_1D if len(rest_1D) else None,
        )

    def exact(self, recipe: Recipe, design: Design) -> Exact:
        return "logits" if _of(design).copies_base else "nothing"

    def usage(self, geometry: Geometry) -> str:
        shared = " beside a shared one that is always on" if geometry.shared_size else ""
        return (
            f"A token uses {geometry.top_k} of {geometry.num_experts} models' FFNs in each layer"
            f"{shared}."
        )

    def made(self, design: Design) -> str:
        rest = design.methods.rest.name
        return f"{self.name}, router {_router(design.methods).name}, rest {rest}"

    def used(self, methods: Methods, geometry: Geometry) -> dict[str, Bound[Any]]:
        rest = {} if methods.rest.name == "base" else {"rest": methods.rest}
        return {"router": _router(methods)} | rest

    def card(self, design: Design) -> str:
        merge, geometry = _of(design), design.geometry
        experts = "\n".join(
            f"- expert {i}: {_card_line(expert)}" for i, expert in enumerate(merge.experts)
        )
        shared = f"\n- always on: {_card_line(merge.shared)}" if merge.shared else ""
        return (
            f"Every layer's experts are the FFNs of {geometry.num_experts} models, of which "
            f"{geometry.top_k} are active per token;\nof all that is no FFN: "
            f"{design.methods.rest.method.summary}.\n\n"
            f"{experts}{shared}"
        )

    def notes(
        self, recipe: Recipe, design: Design, target: MoETarget, hosts: Collection[str]
    ) -> Iterator[str]:
        """What to know of such a model before it is trained."""
        merge, geometry = _of(design), design.geometry
        router, gate = _router(design.methods).name, design.methods.gate
        if gate is not None and gate.method.note:
            yield gate.method.note
        blind = router in RANDOM
        if merge.one_model and len(merge.experts) > 1:
            computes = "the base" if merge.copies_base else "that model in its FFNs"
            yield (
                f"all {len(merge.experts)} experts are equal"
                + (" and the router is random" if blind else "")
                + f", so the result computes {computes} until it is trained"
            )
        elif gate is None and geometry.top_k < geometry.num_experts:
            yield (
                f"router {router} knows nothing of the experts: which of them a token gets is "
                "chance until it is trained; prompts or `text` make a router that knows"
            )
        if geometry.top_k == geometry.num_experts > 1:
            yield (
                f"{geometry.top_k} of {geometry.num_experts} experts are on for every token: "
                "nothing is skipped, so it is as slow as all of them"
            )
        if geometry.top_k == 1 and geometry.num_experts > 1:
            yield (
                "with one expert per token its renormalised weight is always 1, so training gives "
                "the router no gradient: two per token do"
            )


WAYS.add("merge", MergeWay())


@dataclass(frozen=True)
class Scaled:
    """Makes expert e of its model's FFN when asked, so that two never lie in memory together."""

    experts: Sequence[Expert]
    ffns: Sequence[DenseFFN]
    seed: int
    layer: int

    def __call__(self, place: int) -> DenseFFN:
        expert, ffn = self.experts[place], self.ffns[place]
        if expert.plain:
            return ffn
        ffn = ffn.to("cpu", torch.float32)
        if expert.noise_scale:
            rng = generator(self.seed, f"noise expert {place}", self.layer)
            ffn = _noisy(ffn, expert.noise_scale, rng)
        return replace(ffn, down_DF=ffn.down_DF * expert.residual_scale)


def _noisy(ffn: DenseFFN, scale: float, rng: torch.Generator) -> DenseFFN:
    """The FFN with N(0, scale) added to each of its matrices."""

    def noisy(matrix: Tensor) -> Tensor:
        return matrix + scale * torch.randn(matrix.shape, generator=rng)

    return ffn.changed(noisy)


def _router(methods: Methods) -> Bound[Any]:
    return methods.gate or methods.router


def _of(design: Design) -> Merge:
    if design.merge is None:
        raise ValueError("the design has no merge")
    return design.merge


def _card_line(expert: Expert) -> str:
    """A model as a card names it, with what was done to its FFN."""
    scale = f", output × {expert.residual_scale:g}" if expert.residual_scale != 1 else ""
    noise = f", noise of {expert.noise_scale:g}" if expert.noise_scale else ""
    return f"`{expert.model.public}`{scale}{noise}"
