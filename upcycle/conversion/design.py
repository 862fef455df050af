"""The design: what every FFN becomes. All that making experts depends on, but the layer itself."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upcycle.conversion.compensate import COMPENSATIONS
from upcycle.conversion.compensate.base import Compensation
from upcycle.conversion.fit import FITS
from upcycle.conversion.fit.base import Fit
from upcycle.conversion.merging.request import Merge
from upcycle.conversion.recipe import Recipe
from upcycle.conversion.rest import RESTS
from upcycle.conversion.rest.registry import Run as MergeRest
from upcycle.core.binding import Bound, bind
from upcycle.core.registry import Method
from upcycle.core.settings import Choice
from upcycle.core.types import Geometry
from upcycle.models.targets import Combine, Gains
from upcycle.models.targets.base import Routing
from upcycle.router_init import ROUTERS
from upcycle.router_init.base import Router
from upcycle.router_init.gates import GATES
from upcycle.router_init.gates.base import Gate
from upcycle.split import SPLITS
from upcycle.split.base import Split
from upcycle.split.copies import PERTURBS
from upcycle.split.shared import SHARED


@dataclass(frozen=True)
class Methods:
    """The plug-ins that a recipe names, with their parameters."""

    split: Bound[Split]
    shared_by: Bound[Method[Any]]
    router: Bound[Router]
    fit: Bound[Fit]
    compensate: Bound[Compensation]
    perturb: Bound[Method[Any]] | None
    """What makes copies differ, if anything does."""
    gate: Bound[Gate] | None
    """What makes a merge's router from text, in place of `router`."""
    rest: Bound[Method[MergeRest]]
    """How several models' tensors become one's, but for the FFNs."""

    @classmethod
    def of(cls, recipe: Recipe, default_router: str, *, gates: bool = False) -> "Methods":
        """Those of a recipe.

        Args:
            gates: whether the recipe's router may be a gate.

        Raises:
            UpcycleError: one does not exist, or does not take its parameters.
        """
        chosen = recipe.router or Choice(name=default_router)
        gated = gates and chosen.name in GATES
        return cls(
            split=bind(SPLITS, recipe.split),
            shared_by=bind(SHARED, recipe.shared_by),
            router=bind(ROUTERS, Choice(name=default_router) if gated else chosen),
            gate=bind(GATES, chosen) if gated else None,
            fit=bind(FITS, recipe.fit),
            compensate=bind(COMPENSATIONS, recipe.compensate),
            perturb=bind(PERTURBS, recipe.method) if recipe.method.name in PERTURBS else None,
            rest=bind(RESTS, recipe.rest),
        )


@dataclass(frozen=True)
class Design:
    """What every FFN that is not kept dense becomes."""

    methods: Methods
    geometry: Geometry
    combine: Combine
    routing: Routing
    """The target's."""
    gains: Gains
    router_spread: float
    """Standard deviation of a token's logits over experts."""
    sequential: bool
    """Whether the stream goes through converted layers."""
    feedback: float
    """How much of what the hidden states have come to lack a layer's refit makes up for."""
    dtype: torch.dtype
    """That is written."""
    seed: int
    merge: Merge | None = None
    """Of several models, which are experts and how."""

    def weigh(self, logits_TE: Tensor) -> Tensor:
        """What each expert counts by the router's logits [T, E]; see `Routing.weights`."""
        return self.routing.weights(logits_TE, self.geometry.top_k, self.gains)

    @property
    def streams(self) -> bool:
        """Whether calibration tokens go through the dense model: always when the router's scale
        must be known, else only if a method looks at activations."""
        return self.combine == "sum" or self.methods.router.method.needs_activations

    @property
    def refits(self) -> tuple[str, ...]:
        """The matrices of a `DenseFFN` that do not stay the dense model's."""
        methods = self.methods
        return tuple(dict.fromkeys(methods.fit.method.refits + methods.compensate.method.refits))

    @property
    def fits(self) -> bool:
        """Whether layers learn by gradient descent."""
        return bool(self.methods.fit.method.learns)

    @property
    def compensates(self) -> bool:
        """Whether weights are refit to make up for what is off."""
        return bool(self.methods.compensate.method.refits)
