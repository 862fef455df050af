"""Copy: every expert is the whole FFN (sparse upcycling), changed or not, or cut into shards.

Copies are averaged, so that the model computes what it did; it is larger, and meant to be trained.
A perturbation (`split/copies/`) makes them differ from the start.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch

from upcycle.conversion.converted import ConvertedLayer, Inputs, route, stored
from upcycle.conversion.design import Design, Methods
from upcycle.conversion.geometry import copied_geometry
from upcycle.conversion.recipe import Recipe
from upcycle.conversion.ways.base import WAYS, Exact, Room, Way, check_alike, check_no_fit
from upcycle.core.binding import Bound
from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.rng import generator
from upcycle.core.types import ExpertLayout, Geometry
from upcycle.models.targets import TARGETS
from upcycle.models.targets.base import MoETarget
from upcycle.split.copies import PERTURBS


class Copy(Way):
    default_router = "normal"
    lossy = False
    averages = True

    def __init__(self, name: str = "copy") -> None:
        self.name = name

    def check(self, recipe: Recipe, methods: Methods) -> None:
        check_alike(recipe, methods)
        check_no_fit(recipe)
        if recipe.compensate.name != "none":
            raise UpcycleError(
                f"{setting('compensate', recipe.compensate)} goes with a split: copies lose nothing"
            )
        if recipe.active is not None:
            raise UpcycleError(
                f"`active={recipe.active:g}` goes with a split: for copies, give `top_k`"
            )
        if recipe.keep_dense == "auto":
            raise UpcycleError("`keep_dense=auto` goes with a split: copies do no damage")

    def geometry(self, recipe: Recipe, room: Room) -> Geometry:
        return copied_geometry(recipe, room.num_neurons, room.most_top_k)

    def make(self, design: Design, inputs: Inputs) -> ConvertedLayer:
        """N copies of G shards; a copy's shards share a router row, so they are chosen together
        (NVIDIA's virtual groups, arXiv:2410.07524)."""
        geometry, ffn = design.geometry, inputs.ffn
        neurons_F = torch.arange(ffn.num_neurons)
        copies_NF = neurons_F.expand(geometry.copies, -1)
        rng = generator(design.seed, "router", inputs.layer)
        router_ND = route(design, inputs.activations, copies_NF, rng)
        shards_GM = neurons_F.view(geometry.granularity, -1)
        layout = ExpertLayout(shards_GM.repeat(geometry.copies, 1), neurons_F[:0])
        router_ED = router_ND.repeat_interleave(geometry.granularity, dim=0)
        return ConvertedLayer(ffn, layout, stored(design, inputs, router_ED), neurons_F)

    def exact(self, recipe: Recipe, design: Design) -> Exact:
        unperturbed = design.methods.perturb is None
        equal = unperturbed and design.geometry.whole_copies and not recipe.spread_gain
        return "logits" if equal else "nothing"

    def used(self, methods: Methods, geometry: Geometry) -> dict[str, Bound[Any]]:
        perturbed = {} if methods.perturb is None else {"method": methods.perturb}
        return {"router": methods.router} | perturbed

    def usage(self, geometry: Geometry) -> str:
        copies = "one copy" if geometry.copies == 1 else f"{geometry.copies} copies"
        if geometry.granularity == 1:
            return f"A token uses {geometry.top_k} of {copies} of each FFN."
        experts = f"{geometry.top_k} of {geometry.num_experts} shards"
        return f"A token uses {experts}, of {copies} of each FFN."

    def made(self, design: Design) -> str:
        return f"{self.name}, router {design.methods.router.name}"

    def card(self, design: Design) -> str:
        geometry, perturb = design.geometry, design.methods.perturb
        shards = f", {geometry.granularity} shards a copy" if geometry.granularity > 1 else ""
        changed = f", then changed by `{perturb.name}`" if perturb is not None else ""
        return (
            f"Every layer's FFN was copied {geometry.copies} times, into {geometry.num_experts} "
            f"experts{shards}{changed};\n{geometry.top_k} are active per token. It is meant to be "
            "trained further."
        )

    def notes(
        self, recipe: Recipe, design: Design, target: MoETarget, hosts: Collection[str]
    ) -> Iterator[str]:
        """Why copies do not compute what the dense model does, before they are trained."""
        geometry = design.geometry
        top_k, granularity = geometry.top_k, geometry.granularity
        if not geometry.whole_copies:
            whole = max(top_k // granularity, 1) * granularity
            yield (
                f"`top_k={top_k}` is no multiple of {setting('granularity', granularity)}, so "
                "tokens get parts of copies: until it is trained, the result is not the dense "
                f"model (`top_k={whole}` would be)"
            )
        elif granularity > 1 and not target.groups:
            yield from _ties(target, hosts, design.dtype)
        if recipe.spread_gain:
            yield (
                f"{setting('spread_gain', True)} multiplies gate_proj, too, in which an FFN is not "
                "linear: until it is trained, the result is not the dense model"
            )


def _ties(target: MoETarget, hosts: Collection[str], dtype: torch.dtype) -> Iterator[str]:
    """Where two copies may score the same, so that a token gets shards of both: the sigmoid of
    small logits is coarse even in float32."""
    fine = target.routing.score == "softmax"
    if fine and dtype == torch.float32:
        return
    keeping = [f"`target={name}`" for name in hosts if TARGETS[name].groups]
    keeping += ["`dtype=float32`"] * fine
    first = "".join(f": {best} keeps copies whole" for best in keeping[:1])
    others = "".join(f", and so does {other}" for other in keeping[1:])
    yield (
        f"{'below float32, ' if fine else ''}two copies score the same on some tokens, which then "
        f"get shards of both{first}{others}"
    )


for _name in ("copy", *PERTURBS):
    WAYS.add(_name, Copy(_name))
