"""The plan of a conversion: every decision made and every foreseeable error raised.

Reads headers, never weights, and writes nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from upcycle.conversion.beside import Beside
from upcycle.conversion.design import Design, Methods
from upcycle.conversion.geometry import active_ffn_ratio
from upcycle.conversion.merging.finished import Finished, Weights
from upcycle.conversion.merging.passages import passage_tokens
from upcycle.conversion.merging.request import Merge
from upcycle.conversion.merging.rest import check_rest, read_merged
from upcycle.conversion.merging.sources import Sources
from upcycle.conversion.notes import doubled, layout_notes, source_notes, warnings
from upcycle.conversion.recipe import Recipe
from upcycle.conversion.request import (
    check_calibration,
    check_tokens,
    named_dense_layers,
    suited,
)
from upcycle.conversion.runtimes import (
    for_runtimes,
    runtime_refusals,
    runtimes_lost,
    takes_dense_layers,
)
from upcycle.conversion.units import PARTS
from upcycle.conversion.ways import WAYS, Room, Way
from upcycle.conversion.ways.base import Exact
from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.machine import choose_device, free_memory, total_memory
from upcycle.core.paths import local_path
from upcycle.core.registry import suggest
from upcycle.core.settings import Choice
from upcycle.core.types import Activation, DenseFFN, Geometry, MoELayer
from upcycle.evaluation.distance import Meter
from upcycle.models.assemble import (
    Named,
    assemble_embeddings,
    assemble_head,
    assemble_layer,
    in_whole,
)
from upcycle.models.calibration import CHECK_WINDOW, check_seq_len
from upcycle.models.source import DenseSource, check_own_files
from upcycle.models.targets import (
    TARGETS,
    Combine,
    MoESpec,
    MoETarget,
    Runtime,
    common_fields,
    unplaced,
)
from upcycle.models.text import PROBES, texts
from upcycle.models.tokens import load_tokenizer
from upcycle.models.traits import Architecture, Trait
from upcycle.models.writer import TensorSpec, check_out

WRITING = 1.5  # times its weights is what a model takes in memory that writes text
SPREAD, UNFITTED_SPREAD = 0.1, 0.01
"""Of a router's logits where a refit knows of the uneven weights that they make, and where none
does: as large as costs little (docs/concepts/identity.md), so that training finds an ordinary
router."""
EXACT_SPREAD = 1e-4
"""Where copies must each count 1, though weights are not renormalised: softmax is then constant
within the check's tolerance."""
MOST_FEEDBACK = 0.5  # unless more is asked for
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
        room = _room(self.source.arch, self.target, 0)
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
        return _streams(self.design)

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
        # The experts' texts are read once more, mixed.
        kinds = len(PROBES) + len(texts(self.recipe.calibration)) + len(own) + (len(own) > 1)
        return kinds * self.check_windows * min(self.recipe.seq_len, CHECK_WINDOW)

    @property
    def fit_tokens(self) -> int:
        sequences = max(1, self.recipe.calibration_tokens // self.recipe.seq_len)
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


def make_plan(
    source: DenseSource,
    recipe: Recipe,
    out: Path | None = None,
    *,
    sources: Sources | None = None,
    finished: Finished | None = None,
    notes: tuple[str, ...] = (),
    overwrite: bool = False,
    resume: bool = False,
) -> Plan:
    """Decide everything; see `Plan`.

    Args:
        sources: of a merge, whose base is `source`.
        finished: the merge that gets the last of them as an expert more.
        notes: on what was asked for.

    Raises:
        UpcycleError: the request can't be carried out, with the nearest one that can.
    """
    way = WAYS[recipe.method.name]
    methods = _methods(recipe, way, sources, finished)
    recipe = suited(recipe, source, merges=way.several)
    dense_layers, asked = named_dense_layers(recipe, source), source
    merge = sources.merge if sources else None
    source, arch, targets = _laid_out(recipe, source, dense_layers, merge)
    target = _choose_target(recipe, way, arch, targets)
    room = _room(arch, target, len(dense_layers))
    geometry = way.geometry(recipe, room)
    combine = _combine(recipe, way, geometry, target, targets)
    design = _design(recipe, way, methods, source, target, geometry, combine, room, merge)
    spec = MoESpec(geometry, design.gains, dense_layers)
    device = choose_device(recipe.device)
    calibration, left_out = _calibration(recipe, way, source, device)
    beside = Beside.of(source, fitted=_streams(design))
    units = _units(source, target, spec, design.dtype, beside)
    layers = room.layers - len(dense_layers) + len(beside.drafts)
    said = (*source_notes(source, design.dtype), *layout_notes(asked, arch, target, spec))
    said += (*beside.notes(), *warnings(recipe, way, spec, target, design, _reached(targets)))
    plan = Plan(
        source=source,
        request=recipe,
        recipe=_resolved(recipe, methods, target, geometry, calibration, arch != asked.arch),
        out=None if out is None else local_path(out).resolve(),
        target=target,
        targets=targets,
        way=way,
        design=design,
        spec=spec,
        config=_config(arch, target, spec, design.dtype) | beside.count,
        device=device,
        beside=beside,
        units=units,
        params_dense=sum(torch.Size(i.shape).numel() for i in source.tensors.values()),
        params_active=_params_active(units, geometry, arch, TARGETS[target], layers),
        warnings=(*notes, *said, *left_out),
        runtimes=runtime_refusals(recipe, arch, target, spec, combine),
        sources=sources,
        finished=finished,
    )
    _check(plan, overwrite=overwrite, resume=resume)
    return plan


def _laid_out(
    recipe: Recipe, source: DenseSource, dense_layers: tuple[int, ...], merge: Merge | None
) -> tuple[DenseSource, Architecture, dict[str, str]]:
    """The source and what it is as it is written, its output embeddings tied or not, and every
    target, with why it can't be chosen."""
    arch = source.arch.untied() if recipe.untied and source.arch.tied else source.arch
    hosts = refusals(arch, recipe, dense_layers, merge)
    arch, targets = for_runtimes(recipe, arch, hosts, _spec)
    return replace(source, arch=arch), arch, targets


def _params_active(
    units: Mapping[str, tuple[TensorSpec, ...]],
    geometry: Geometry,
    arch: Architecture,
    target: MoETarget,
    layers: int,
) -> int:
    """Parameters that a token uses, where so many layers have experts."""
    total = sum(s.numel for unit in units.values() for s in unit)
    matrices = 3 if target.gated else 2
    return total - geometry.idle_neurons * matrices * arch.hidden_size * layers


def _config(arch: Architecture, target: str, spec: MoESpec, dtype: torch.dtype) -> dict[str, Any]:
    made = TARGETS[target]
    config = common_fields(arch, made, dtype) | made.config(arch, spec)
    if not arch.head:
        bare = [name.replace("ForCausalLM", "Model") for name in config["architectures"]]
        config["architectures"] = bare
    return config


def _reached(targets: Mapping[str, str]) -> list[str]:
    """The targets that can host the model."""
    return [name for name, why in targets.items() if not why]


def _spec(recipe: Recipe, arch: Architecture, target: str) -> MoESpec:
    """What the request makes of the model in a target.

    Raises:
        UpcycleError: the target does not host it.
    """
    way = WAYS[recipe.method.name]
    dense_layers = () if recipe.keep_dense == "auto" else recipe.keep_dense
    targets = refusals(arch, recipe, dense_layers)
    if targets[target]:
        raise UpcycleError(targets[target])
    geometry = way.geometry(recipe, _room(arch, target, len(dense_layers)))
    combine = _combine(recipe, way, geometry, target, targets)
    return MoESpec(geometry, TARGETS[target].gains(combine, geometry), dense_layers)


def _methods(
    recipe: Recipe, way: Way, sources: Sources | None, finished: Finished | None
) -> Methods:
    """Those of a recipe that goes with the way, if as many models are there as that takes.

    Raises:
        UpcycleError: it does not, or there are more or fewer.
    """
    methods = Methods.of(recipe, way.default_router, gates=way.several)
    if way.several and sources is None:
        raise UpcycleError(f"`method={way.name}` takes several models: upcycle {way.name} MODEL…")
    if not way.several and methods.rest.name != "base":
        raise UpcycleError(f"`rest={methods.rest.name}` goes with upcycle merge: here is one model")
    way.check(recipe, methods)
    if sources is not None and finished is None:
        check_rest(sources, methods.rest)
    return methods


def _streams(design: Design) -> bool:
    return design.combine == "sum" or design.methods.router.method.needs_activations


def _room(arch: Architecture, target: str, num_dense: int) -> Room:
    return Room(
        num_neurons=arch.intermediate_size,
        layers=len(arch.ffn_layers),
        num_dense=num_dense,
        shared_width=TARGETS[target].shared_width,
        min_experts=TARGETS[target].min_experts,
        most_top_k=TARGETS[target].most_top_k,
    )


def _design(
    recipe: Recipe,
    way: Way,
    methods: Methods,
    source: DenseSource,
    target: str,
    geometry: Geometry,
    combine: Combine,
    room: Room,
    merge: Merge | None,
) -> Design:
    compensates = bool(methods.compensate.method.refits)
    routing = TARGETS[target].routing
    dtype = source.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    least = max(SPREAD if compensates else UNFITTED_SPREAD, routing.least_spread(dtype))
    gains = TARGETS[target].gains(combine, geometry)
    return Design(
        methods=methods,
        geometry=geometry,
        combine=combine,
        routing=routing,
        gains=gains.over_three_matrices() if recipe.spread_gain else gains,
        router_spread=EXACT_SPREAD if way.averages else recipe.router_spread or least,
        sequential=recipe.sequential and way.lossy,
        feedback=_feedback(recipe, way, methods, source.arch, geometry, room),
        dtype=dtype,
        seed=recipe.seed,
        merge=merge,
    )


def _feedback(
    recipe: Recipe,
    way: Way,
    methods: Methods,
    arch: Architecture,
    geometry: Geometry,
    room: Room,
) -> float:
    """How much of what was lost before a layer's refit makes up for: nothing where the FFN's output
    is not what is added to the hidden states, or where that helps no more than it harms."""
    follows = way.takes_feedback and recipe.sequential and methods.compensate.method.refits
    if not follows or Trait.POST_NORM in arch.traits:
        return 0.0
    asked = getattr(methods.compensate.params, "feedback", 0.0)
    if asked is not None:
        return float(asked)
    return min(MOST_FEEDBACK, active_ffn_ratio(geometry, room.layers, room.num_dense))


def _resolved(
    recipe: Recipe,
    methods: Methods,
    target: str,
    geometry: Geometry,
    calibration: str,
    untied: bool,
) -> Recipe:
    """The recipe with what it left open."""
    decided = {
        "target": target,
        "experts": geometry.copies,
        "top_k": geometry.top_k,
        "shared": geometry.shared_ratio,
        "router": recipe.router or Choice(name=methods.router.name),
        "calibration": calibration,
        "untied": untied or recipe.untied,
    }
    return recipe.model_copy(update=decided)


def _calibration(
    recipe: Recipe, way: Way, source: DenseSource, device: torch.device
) -> tuple[str, tuple[str, ...]]:
    """The calibration text, with `mixed` decided, and what is to be said of that."""
    names = texts(recipe.calibration)
    if "mixed" not in names:
        return recipe.calibration, ()
    mixed, notes = _mixed(way, source, device)
    return "+".join(mixed if name == "mixed" else name for name in names), notes


def _mixed(way: Way, source: DenseSource, device: torch.device) -> tuple[str, tuple[str, ...]]:
    """What `mixed` stands for: both, or the first alone where the model can't write."""
    if not way.lossy or not source.arch.goes_on:  # nothing is fitted, or it writes nothing
        return "builtin", ()
    needed = WRITING * sum(info.nbytes for info in source.tensors.values())
    free = free_memory(device)
    if needed <= free:
        return "builtin+self", ()
    note = (
        f"calibration lacks the model's own writing, for which it would take {needed / 1e9:.1f} GB "
        f"of memory ({free / 1e9:.1f} GB are free): add text of the kind that the model will see, "
        "`calibration=mixed+FILE`"
    )
    return "builtin", (note,)


def refusals(
    arch: Architecture,
    recipe: Recipe,
    dense_layers: tuple[int, ...] = (),
    merge: Merge | None = None,
) -> dict[str, str]:
    """Every target, with why it can't host this model; empty if it can."""
    experts = None if recipe.experts is None else recipe.experts * recipe.granularity
    return {
        name: target.refusal(
            arch,
            dense_layers=dense_layers,
            shared=recipe.shared,
            gated=merge is not None and merge.gates_shared(_router_name(recipe)),
            experts=experts,
            top_k=recipe.top_k,
        )
        for name, target in TARGETS.items()
    }


def _router_name(recipe: Recipe) -> str:
    return "" if recipe.router is None else recipe.router.name


def _choose_target(recipe: Recipe, way: Way, arch: Architecture, targets: Mapping[str, str]) -> str:
    reachable = ", ".join(_reached(targets)) or "none"
    if recipe.target != "auto":
        if recipe.target not in TARGETS:
            hint = suggest(recipe.target, TARGETS)
            beside = f" (reachable: {reachable})" if way.several else ""
            raise UpcycleError(f"unknown target {recipe.target!r}{hint}{beside}")
        if targets[recipe.target]:
            raise UpcycleError(
                f"`target={recipe.target}`: {targets[recipe.target]} (reachable: {reachable})"
            )
        return recipe.target
    reachable_names = _reached(targets)
    if not reachable_names:
        raise UpcycleError(
            f"no native MoE architecture hosts this model: {_unhosted(arch, targets)}"
        )
    if way.softmax_rows:
        reachable_names = _softmax(targets) or reachable_names
    if _router_needs_plain_weights(recipe, way):
        reachable_names = [n for n in reachable_names if _plain_weights(n)] or reachable_names
    rank = "copy_rank" if way.averages else "split_rank"
    return min(reachable_names, key=lambda name: int(getattr(TARGETS[name], rank)))


def _softmax(targets: Mapping[str, str]) -> list[str]:
    """The targets that fit and score by a softmax; none, where the model has no such host.

    Raises:
        UpcycleError: it has one, but that has no shared expert, which is asked for.
    """
    softmax = {n: why for n, why in targets.items() if TARGETS[n].routing.score == "softmax"}
    fitting = [name for name, why in softmax.items() if not why]
    lacking = [why for name, why in softmax.items() if why == f"{name} has no shared expert"]
    if lacking and not fitting:
        others = " or ".join(name for name, why in targets.items() if not why) or "none"
        raise UpcycleError(
            f"{lacking[0]}: leave it out, or choose a target that has one but scores by sigmoids "
            f"({others})"
        )
    return fitting


def _unhosted(arch: Architecture, targets: Mapping[str, str]) -> str:
    """Why no target can host the model: what none has a place for, else what each lacks; of those
    that are made for its kind, if there are any."""
    nowhere = unplaced(arch)
    if nowhere:
        return f"the source has {' and '.join(nowhere)}, which none has a place for"
    near = [name for name in targets if not TARGETS[name].misfit(arch)]
    return "; ".join(f"{name}: {targets[name]}" for name in near or targets)


def _router_needs_plain_weights(recipe: Recipe, way: Way) -> bool:
    """When a token gets one expert only, its renormalised weight is constant, and the router would
    get no gradient. (One copy of several shards learns by how it weights these.)"""
    one = way.averages and recipe.top_k == 1 and not recipe.allow_frozen_router
    return one or recipe.spread_gain


def _plain_weights(target: str) -> bool:
    return TARGETS[target].routing.renormalises != "always"


def _combine(
    recipe: Recipe, way: Way, geometry: Geometry, target: str, targets: Mapping[str, str]
) -> Combine:
    """A split is a sum, copies are averaged, unless their router needs plain weights: then whole
    ones count 1 each."""
    if not way.averages:
        return "sum"
    never = TARGETS[target].routing.renormalises == "never"
    if not never and not _router_needs_plain_weights(recipe, way):
        return "mean"
    if recipe.spread_gain:
        return "plain" if _plain_weights(target) else "mean"
    if not _plain_weights(target):
        others = [name for name, why in targets.items() if not why and _plain_weights(name)]
        choose = f"choose `target={' or '.join(others)}`, " if others else ""
        raise UpcycleError(
            f"`top_k=1` gives each token one expert, and {target} always renormalises "
            f"its weight, so the router would get no gradient: raise `top_k`, {choose}or pass "
            f"{setting('allow_frozen_router', True)}"
        )
    return "sum" if geometry.whole_copies else "plain"


def _units(
    source: DenseSource, target: str, spec: MoESpec, dtype: torch.dtype, beside: Beside
) -> dict[str, tuple[TensorSpec, ...]]:
    """A dry run on the meta device: the names and shapes that the conversion will write."""

    def meta(names: Iterable[str], prefix: str = "") -> dict[str, Tensor]:
        empty = {
            n.removeprefix(prefix): torch.empty(source.tensors[n].shape, dtype=dtype, device="meta")
            for n in names
        }
        return source.canonical(empty)

    def layer(place: str, names: list[str], *, routed: bool) -> Named:
        moe = _meta_layer(spec, source.arch, dtype) if routed else None
        return assemble_layer(host, source.arch, place, meta(names, place), moe, spec.gains)

    host, outer = TARGETS[target], meta(source.outer_names())
    named = {"embeddings": assemble_embeddings(host, outer)}
    for i in range(source.arch.num_layers):
        routed = i in source.arch.ffn_layers and i not in spec.dense_layers
        place = f"model.layers.{i}."
        named[f"layer {i}"] = layer(place, source.layer_names(i), routed=routed)
    named["head"] = assemble_head(host, source.arch, outer)
    units = {unit: _specs(in_whole(host, source.layout, each)) for unit, each in named.items()}
    for place in beside.drafts:
        names = [name for name in source.draft_names() if name.startswith(place)]
        units[place] = _specs(layer(place, names, routed=True))
    if beside.kept:
        kept = {source.layout.stored(name): tensor for name, tensor in meta(beside.kept).items()}
        units[PARTS] = _specs(kept.items())
    return units


def _specs(named: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tuple(t.shape), t.dtype) for name, t in named)


def _meta_layer(spec: MoESpec, arch: Architecture, dtype: torch.dtype) -> MoELayer:
    def ffn(size: int) -> DenseFFN:
        rows = torch.empty(size, arch.hidden_size, dtype=dtype, device="meta")
        gate = None if Trait.UNGATED in arch.traits else rows
        return DenseFFN(gate, rows, rows.T, act=lambda x: x)

    router_ED = torch.empty(spec.geometry.num_experts, arch.hidden_size, dtype=dtype, device="meta")
    shared = ffn(spec.geometry.shared_size) if spec.geometry.shared_size else None
    granularity = spec.geometry.granularity
    expert = ffn(spec.geometry.expert_size)
    return MoELayer(router_ED, lambda e: expert, shared, granularity=granularity)


def _check(plan: Plan, *, overwrite: bool, resume: bool) -> None:
    """What a plan that is whole may still come to grief on."""
    check_own_files(plan.source.folder)
    _check_feedback(plan)
    _check_ties(plan)
    _check_text(plan)
    _check_gradients(plan)
    _check_memory(plan)
    if plan.finished is not None:
        before = plan.finished.spec(plan.spec)
        units = _units(plan.source, plan.target, before, plan.design.dtype, plan.beside)
        plan.finished.check_layout([spec for unit in units.values() for spec in unit])
        check_own_files(plan.finished.folder)
    if plan.out is not None:
        room = plan.bytes + plan.aside_bytes()
        for source in plan.checkpoints:
            check_out(plan.out, source.folder, room, overwrite=overwrite, resume=resume)


def _check_feedback(plan: Plan) -> None:
    asked = plan.recipe.compensate.params.get("feedback")
    if asked and not plan.design.feedback:
        why = f"{plan.source.arch.family} has a norm between its FFN and the hidden states"
        if not plan.design.sequential:
            why = f"{setting('sequential', False)} fits layers on the dense model's hidden states"
        if not plan.way.takes_feedback:
            why = "pruned copies are fitted to the dense FFN's output"
        raise UpcycleError(f"compensate.feedback={asked} has no effect: {why}, so give 0")


def _check_ties(plan: Plan) -> None:
    """Copies of which each must count 1 have hardly different scores, which some targets round."""
    design = plan.design
    if not plan.way.averages or design.combine != "sum":
        return
    if design.router_spread < design.routing.least_spread(design.dtype):
        raised = "" if TARGETS[plan.target].most_top_k == 1 else "raise `top_k`, or "
        raise UpcycleError(
            f"`top_k=1`: {plan.target} rounds the scores of copies that count 1 each to one and "
            f"the same below float32, so that all tokens would get the same copy: {raised}pass "
            "`dtype=float32`"
        )


def _check_text(plan: Plan) -> None:
    methods = plan.design.methods
    check_calibration(plan.recipe, methods, streams=plan.streams)
    if plan.streams:
        used = plan.way.used(methods, plan.design.geometry)
        # Each half of a sequence goes through one of an encoder-decoder's stacks.
        tokens = plan.fit_tokens // (2 if plan.source.arch.encoder_layers else 1)
        check_tokens(plan.recipe, used, tokens, plan.most_routed)
    if plan.fit_tokens + plan.held_tokens + plan.passage_tokens:
        check_seq_len(plan.recipe.seq_len, plan.source.config)
        load_tokenizer(plan.source.folder)


def _check_gradients(plan: Plan) -> None:
    if not plan.needs_gradients:
        return
    arch, why = plan.source.arch, ""
    if arch.encoder:
        why = "is an encoder, which has no loss of the next token"
    elif arch.encoder_layers:
        why = "is an encoder-decoder, through which no gradients are taken back"
    elif arch.fields.get("num_kv_shared_layers"):
        why = "has layers that share keys and values, through which no gradients are taken back"
    if why:
        used = plan.way.used(plan.design.methods, plan.design.geometry).items()
        asking = next(field for field, bound in used if bound.params.needs_gradients)
        raise UpcycleError(
            f"{setting(asking, getattr(plan.recipe, asking))} needs a backward pass, but "
            f"{plan.source.label} {why}: choose another, or importance=output"
        )


def _check_memory(plan: Plan) -> None:
    free, there_is = free_memory(plan.device), total_memory(plan.device)
    hidden = 4 * plan.fit_tokens * plan.source.arch.hidden_size
    if hidden > there_is:
        raise UpcycleError(
            f"`calibration_tokens={plan.recipe.calibration_tokens}` have hidden states of "
            f"{hidden / 1e9:.1f} GB, but there are {there_is / 1e9:.1f} GB of memory: give fewer"
        )
    if plan.check_bytes() > free:
        raise UpcycleError(
            f"the check holds the finished model, {plan.check_bytes() / 1e9:.1f} GB, but "
            f"{free / 1e9:.1f} GB of memory are free: pass `check=none` and evaluate where it fits"
        )
