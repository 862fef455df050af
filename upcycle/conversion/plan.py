"""The plan of a conversion: all that is decided before a weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from upcycle.conversion.beside import Beside
from upcycle.conversion.design import Design
from upcycle.conversion.geometry import active_ffn_ratio
from upcycle.conversion.merging.finished import Finished, Weights
from upcycle.conversion.merging.passages import passage_tokens
from upcycle.conversion.merging.rest import read_merged
from upcycle.conversion.merging.sources import Sources
from upcycle.conversion.notes import doubled
from upcycle.conversion.recipe import Recipe
from upcycle.conversion.runtimes import runtimes_lost, takes_dense_layers
from upcycle.conversion.ways import Room, Way
from upcycle.conversion.ways.base import Exact
from upcycle.core.types import Activation, Geometry
from upcycle.evaluation.distance import Meter
from upcycle.models.calibration import CHECK_WINDOW
from upcycle.models.source import DenseSource
from upcycle.models.targets import TARGETS, MoESpec, Runtime
from upcycle.models.text import PROBES, texts
from upcycle.models.writer import TensorSpec

CHECK_TOKENS = {"fast": 1024, "full": 4096, "none": 0}
"""Of each kind of text, at most."""


@dataclass(frozen=True)
class Plan:
    """A conversion that is going to work, as far as can be known without reading weights."""

    source: DenseSource
    request: Recipe
    recipe: Recipe
    """The request with everything that it left open decided."""
    out: Path | None
    target: str
    targets: Mapping[str, str]
    """Every target, with the reason that it is refused, or an empty string."""
    way: Way
    design: Design
    spec: MoESpec
    config: Mapping[str, Any]
    device: torch.device
    beside: Beside
    units: Mapping[str, tuple[TensorSpec, ...]]
    """What is written, in order, by the unit that produces it."""
    params_dense: int
    params_active: int
    warnings: tuple[str, ...]
    runtimes: Mapping[Runtime, str]
    """Every runtime beside transformers 5, with the reason that it does not run the result, or an
    empty string."""
    sources: Sources | None = None
    """The experts' models, of a merge; `source` is its base."""
    finished: Finished | None = None
    """The merge that gets an expert more, where that is all that is to be done."""

    @property
    def specs(self) -> list[TensorSpec]:
        return [spec for unit in self.units.values() for spec in unit]

    @property
    def params_total(self) -> int:
        return sum(spec.numel for spec in self.specs)

    @property
    def bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)

    @property
    def runtimes_lost(self) -> list[Runtime]:
        """The runtimes that do not run the result because some of its layers are dense."""
        arch, combine = self.source.arch, self.design.combine
        return runtimes_lost(self.recipe, arch, self.target, self.spec, combine)

    @property
    def checkpoints(self) -> list[DenseSource | Weights]:
        """All that is read, the source first."""
        others = self.sources.distinct() if self.sources else []
        return [self.source, *others, *([self.finished.weights] if self.finished else [])]

    @property
    def activation(self) -> Activation:
        """Of the source's FFNs."""
        activation: Activation = ACT2FN[self.source.arch.fields["hidden_act"]]
        return activation

    @property
    def moe_layers(self) -> list[int]:
        return [i for i in self.source.arch.ffn_layers if i not in self.spec.dense_layers]

    @property
    def active_ffn_ratio(self) -> float:
        """Active FFN neurons over the dense model's; layers kept dense count as 1."""
        layers, dense = len(self.source.arch.ffn_layers), len(self.spec.dense_layers)
        return active_ffn_ratio(self.design.geometry, layers, dense)

    @property
    def doubled(self) -> str:
        """What it costs that an FFN's first matrix is stored twice, as a sentence without its
        point; empty if it is not."""
        return doubled(self.source.arch, self.target, self.spec)

    @property
    def undecided(self) -> bool:
        """Whether the layers to keep dense are yet to be measured; until then there are none, and
        where the target or a runtime that is asked for has none, it stays at that."""
        runtimes, arch = self.request.runtimes, self.source.arch
        auto = self.request.keep_dense == "auto"
        return auto and takes_dense_layers(runtimes, arch, self.target, self.spec)

    def read(self, names: list[str], meter: Meter | None = None) -> dict[str, Tensor]:
        """These tensors of the source; of a merge, all but FFNs as its rule for the rest has them.

        Args:
            meter: of a merge, is shown the models' tensors.

        Raises:
            UpcycleError: as `DenseSource.read`.
        """
        if self.sources is None:
            return self.source.read(names)
        return read_merged(self.sources, self.design.methods.rest, names, self.design.seed, meter)

    def read_layer(self, layer: int, meter: Meter | None = None) -> dict[str, Tensor]:
        """A layer's tensors by their names below `model.layers.N.`, as the source spells them;
        `meter` as `read` takes it."""
        prefix = f"model.layers.{layer}."
        found = self.read(self.source.layer_names(layer), meter)
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    def geometries(self) -> list[Geometry]:
        """With 0, 1, … of the layers dense, as long as that leaves experts to route."""
        room = Room.of(self.source.arch, TARGETS[self.target])
        return self.way.geometries(self.request, room)

    @property
    def most_routed(self) -> int:
        """The most experts that can come to be routed: what stays dense is taken from the others'
        active share, and so from their shared neurons, unless the request fixes these."""
        possible = self.geometries() if self.undecided else [self.design.geometry]
        return max(geometry.num_experts for geometry in possible)

    @property
    def exact(self) -> Exact:
        """What of the dense model the result must have to rounding."""
        if self.finished is not None:  # It may have been trained since.
            return "nothing"
        return self.way.exact(self.recipe, self.design)

    @property
    def partitions(self) -> bool:
        """Whether each neuron of the dense FFN is in exactly one expert."""
        return self.way.partitions(self.design.methods)

    @property
    def streams(self) -> bool:
        """Whether calibration tokens go through the dense model: always when the router's scale
        must be known, else only if a method looks at activations."""
        return self.design.streams

    @property
    def needs_gradients(self) -> bool:
        """Whether a method looks at the loss's gradients, so that the calibration tokens first go
        through the dense model and back."""
        used = self.way.used(self.design.methods, self.design.geometry)
        return self.streams and any(each.params.needs_gradients for each in used.values())

    @property
    def passage_tokens(self) -> int:
        """Tokens of the text that a merge's router is made from, of prompts roughly."""
        if self.design.merge is None or self.design.methods.gate is None:
            return 0
        return passage_tokens(self.design.merge, self.recipe)

    @property
    def check_windows(self) -> int:
        """Windows of each kind of text that the check reads and no method sees, at most; one is
        enough of copies, whose logits are compared anyway."""
        window = min(self.recipe.seq_len, CHECK_WINDOW)
        windows = -(-CHECK_TOKENS[self.recipe.check] // window)
        return min(1, windows) if self.exact == "logits" else windows

    @property
    def own_texts(self) -> list[str]:
        """The texts of a merge's experts, on which it is measured beside their models; of a
        finished merge, those that are known, if the new expert has one."""
        merge = self.design.merge
        added = self.finished is not None
        if merge is None or (added and merge.experts[-1].text is None):
            return []
        return merge.texts

    @property
    def held_tokens(self) -> int:
        """All that the check reads, at most."""
        own = self.own_texts
        # Of the builtin text nothing is held back: probes stand for it.
        named = {name for name in texts(self.recipe.calibration) if name not in ("builtin", "none")}
        # The experts' texts are read once more, mixed.
        kinds = len(PROBES) + len(named) + len(own) + (len(own) > 1)
        return kinds * self.check_windows * min(self.recipe.seq_len, CHECK_WINDOW)

    @property
    def fit_tokens(self) -> int:
        """In whole sequences, at least one of each text."""
        wanted = self.recipe.calibration_tokens // self.recipe.seq_len
        sequences = max(len(texts(self.recipe.calibration)), wanted)
        return sequences * self.recipe.seq_len if self.streams else 0

    def aside_bytes(self) -> int:
        """Disk that only the run itself needs: what a resumed stream and the check read again, and
        gradients."""
        return self._refit_bytes() + self.gradient_bytes

    @property
    def gradient_bytes(self) -> int:
        """Disk for hidden states on the way through the dense model, then gradients, at most."""
        if not self.needs_gradients:
            return 0
        arch = self.source.arch
        return arch.num_layers * self.fit_tokens * arch.hidden_size * torch.float32.itemsize

    def _refit_bytes(self) -> int:
        """Disk for routers and refit weights."""
        geometry = self.design.geometry
        neurons = self.way.kept_neurons(geometry)
        if not neurons:
            return 0
        rows = geometry.num_experts + len(self.design.refits) * neurons
        hidden = self.source.arch.hidden_size
        return len(self.moe_layers) * rows * hidden * self.design.dtype.itemsize

    def check_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Memory of the check in a dtype, by default the result's: one whole model at a time, and
        of the dense one its head and the hidden states of the tokens held back."""
        if self.recipe.check == "none":
            return 0
        kept = self.held_tokens + int(self.source.arch.fields["vocab_size"])
        values = self.params_total + kept * self.source.arch.hidden_size
        return values * (dtype or self.design.dtype).itemsize + 600 * 2**20
