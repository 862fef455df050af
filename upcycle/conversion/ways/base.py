"""Ways: how experts are made of a dense FFN. One file, one way.

A way is what `--method` names. It checks what is asked of it, counts its experts, makes them, and
says in words what it made; nothing else in the package knows which ways there are.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from upcycle.conversion.converted import ConvertedLayer, Inputs
from upcycle.conversion.design import Design, Methods
from upcycle.conversion.recipe import Recipe
from upcycle.core.binding import Bound
from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.registry import Registry
from upcycle.core.types import DenseFFN, Geometry
from upcycle.models.targets import SharedWidth
from upcycle.models.targets.base import MoETarget
from upcycle.models.traits import Architecture
from upcycle.router_init import ROUTERS

Exact = Literal["logits", "all on", "nothing"]
"""What of the dense model a finished checkpoint must have to rounding: its logits, its logits with
all experts on (beside a dense model with the same weights, where they were refit), or nothing."""


@dataclass(frozen=True)
class Room:
    """What a way has to cut up, and what the target has place for."""

    num_neurons: int
    """F, of the dense FFN."""
    layers: int
    num_dense: int = 0
    """How many of the layers stay dense; the others make up for it in the active share."""
    shared_width: SharedWidth = "none"
    min_experts: int = 1
    most_top_k: int | None = None
    """Experts that the target gives a token at most, where it has such a limit."""

    @classmethod
    def of(cls, arch: Architecture, target: MoETarget, num_dense: int = 0) -> "Room":
        return cls(
            num_neurons=arch.intermediate_size,
            layers=len(arch.ffn_layers),
            num_dense=num_dense,
            shared_width=target.shared_width,
            min_experts=target.min_experts,
            most_top_k=target.most_top_k,
        )


@dataclass(frozen=True)
class Fitting:
    """What fitting a layer holds, for the estimate of memory."""

    neurons: int
    """That are refit together."""
    tokens: int
    """On which they are."""
    at_once: int
    """Tokens whose activations are held."""
    kept: int = 0
    """Weights of finished experts."""


class Way(ABC):
    """One way of making experts of a dense FFN."""

    name: str
    default_router: ClassVar[str]
    lossy: ClassVar[bool] = True
    """Whether what is made is less than the dense FFN, so that a refit, an active share and layers
    kept dense mean something."""
    averages: ClassVar[bool] = False
    """Whether each expert stands for the whole FFN, so that experts are averaged, not summed."""
    several: ClassVar[bool] = False
    """Whether its experts are of several models."""
    softmax_rows: ClassVar[bool] = False
    """Whether the router's rows are made for a softmax, which `--target auto` then keeps to."""
    changed: ClassVar[str] = "copies were changed"
    """Why the result is not the dense model's equal, where that is so."""
    void: ClassVar[tuple[str, ...]] = ("split", "shared_by", "router_spread")
    """Fields of a recipe that change nothing of what is made."""
    takes_feedback: ClassVar[bool] = False
    """Whether a refit may make up for what the layers before have lost."""

    @abstractmethod
    def check(self, recipe: Recipe, methods: Methods) -> None:
        """What is asked goes with this way.

        Raises:
            UpcycleError: it does not.
        """

    @abstractmethod
    def geometry(self, recipe: Recipe, room: Room) -> Geometry:
        """How many of everything, with what the recipe leaves open decided.

        Raises:
            UpcycleError: the FFN can't be cut like this.
        """

    def geometries(self, recipe: Recipe, room: Room) -> list[Geometry]:
        """With 0, 1, … of the layers dense, as long as that leaves experts to route."""
        found = []
        for num_dense in range(room.layers):
            try:
                found.append(self.geometry(recipe, replace(room, num_dense=num_dense)))
            except UpcycleError:
                break
        return found

    @abstractmethod
    def make(self, design: Design, inputs: Inputs) -> ConvertedLayer:
        """The experts and the router of one layer."""

    @abstractmethod
    def exact(self, recipe: Recipe, design: Design) -> Exact:
        """What the check may demand."""

    def partitions(self, methods: Methods) -> bool:
        """Whether each neuron of the dense FFN is in exactly one expert."""
        return False

    def kept_neurons(self, geometry: Geometry) -> int:
        """Neurons per layer whose refit weights are put aside while the conversion runs."""
        return 0

    def take_up(
        self, design: Design, ffn: DenseFFN, permutation: Tensor, router_ED: Tensor, refit: Any
    ) -> ConvertedLayer:
        """A layer again that was made, and put aside.

        Args:
            ffn: the source's, in the dtype that is written.
            refit: the matrices of a `DenseFFN` that were refit.
        """
        raise NotImplementedError(f"layers made by {self.name} are not put aside")

    def used(self, methods: Methods, geometry: Geometry) -> dict[str, Bound[Any]]:
        """The methods that make experts and router, by the field of the recipe that names them."""
        return {"router": methods.router}

    def fitting(self, geometry: Geometry, tokens: int) -> Fitting:
        """What fitting a layer holds."""
        return Fitting(geometry.num_neurons, tokens, tokens)

    @abstractmethod
    def usage(self, geometry: Geometry) -> str:
        """What a token uses of each converted FFN, in a sentence."""

    @abstractmethod
    def made(self, design: Design) -> str:
        """By what the experts were made, as the middle of a sentence."""

    @abstractmethod
    def card(self, design: Design) -> str:
        """What became of every FFN, for the model card."""

    def notes(
        self, recipe: Recipe, design: Design, target: MoETarget, hosts: Collection[str]
    ) -> Iterator[str]:
        """What works, but not all that well.

        Args:
            hosts: the targets in reach.
        """
        return iter(())

    fewer: ClassVar[str] = ""
    """What fewer experts are, where their number was chosen for the user."""


WAYS: Registry[Way] = Registry("method")


def check_no_copies(recipe: Recipe) -> None:
    """Nothing is asked that goes with whole copies alone.

    Raises:
        UpcycleError: it is.
    """
    if recipe.spread_gain:
        raise UpcycleError(
            f"{setting('spread_gain', True)} goes with copies: a split and pruned copies are refit"
        )
    if recipe.granularity != 1:
        raise UpcycleError(
            f"{setting('granularity', recipe.granularity)} goes with copies: for a split, raise "
            "`experts`"
        )


def check_no_fit(recipe: Recipe) -> None:
    """Nothing is asked to be learned layer by layer.

    Raises:
        UpcycleError: it is.
    """
    if recipe.fit.name != "none":
        raise UpcycleError(
            f"{setting('fit', recipe.fit)} goes with a split: give `fit=none`, and train the "
            "result by upcycle finetune"
        )


def check_alike(recipe: Recipe, methods: Methods) -> None:
    """Of experts that are all the same when the router is made.

    Raises:
        UpcycleError: the router can't tell them apart, or neurons are asked to be always on.
    """
    if not methods.router.method.tells_copies_apart:
        fitting = " or ".join(name for name, r in ROUTERS.items() if r.tells_copies_apart)
        raise UpcycleError(
            f"{setting('router', methods.router.name)} has nothing to tell copies apart by: use "
            f"{fitting}"
        )
    if recipe.shared:
        raise UpcycleError(f"`shared={recipe.shared:g}` goes with a split: copies have none")
