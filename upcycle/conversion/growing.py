"""A finished merge with an expert more (Nexus, arXiv:2408.15901): its tensors are copied, and each
layer gets the new model's FFN and one row of the router.

The row is made by the merge's own gate. Where that looks at hidden states, they are those of the
base's FFNs with all else as the merge has it, as when its other rows were made.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from upcycle.conversion.converted import route
from upcycle.conversion.gating import Gating
from upcycle.conversion.merging.finished import Finished
from upcycle.conversion.merging.passages import added_passages
from upcycle.conversion.merging.rest import see_rest
from upcycle.conversion.merging.sources import Sources, read_ffn
from upcycle.conversion.plan import Plan
from upcycle.conversion.units import GATE, write_unit
from upcycle.core.foreign import blaming
from upcycle.core.progress import Progress
from upcycle.core.rng import generator
from upcycle.core.types import DenseFFN, LayerActivations, MoELayer
from upcycle.evaluation.distance import Meter
from upcycle.evaluation.gates import gate_facts
from upcycle.models.assemble import assemble_config, name_in_whole
from upcycle.models.companions import copy_companions
from upcycle.models.names import EMBEDDINGS
from upcycle.models.passages import Grouped, losses_of_models, next_token_losses
from upcycle.models.record.file import DOMAINS
from upcycle.models.stream import HiddenStream
from upcycle.models.targets import TARGETS
from upcycle.models.tokens import open_reader
from upcycle.models.workspace import Workspace
from upcycle.models.writer import CheckpointWriter, TensorSpec
from upcycle.router_init.gates.base import GateRows


@dataclass(frozen=True)
class Growth:
    """A merge that gets an expert more, with all that this takes."""

    plan: Plan
    finished: Finished
    sources: Sources
    gating: Gating | None
    """Makes the new rows; None: they are random."""
    stream: HiddenStream | None
    """The passages on their way through the layers, if the gate looks at hidden states."""
    kept: Mapping[str, Tensor]
    """What the gate left beside the merge."""
    beside: dict[str, Tensor] = field(default_factory=dict)
    """What is left beside the result."""

    def new_ffn(self, layer: int, meter: Meter | None = None) -> DenseFFN:
        """The new model's FFN; shown to the meter beside the base's."""
        base = read_ffn(self.plan.source, self.plan.source.place(layer), self.plan.activation)
        return self.sources.ffns(layer, base, meter)[self.finished.num_experts]

    def row(self, layer: int, ffn: DenseFFN, before_ED: Tensor) -> Tensor:
        """The new expert's row [1, D] of one layer; moves the stream to the next layer.

        Args:
            ffn: the new expert's.
            before_ED: the rows that there are.
        """
        if self.gating is None:
            return self.random_row(layer, ffn)
        prefix = f"model.layers.{layer}."
        kept = {n.removeprefix(prefix): t for n, t in self.kept.items() if n.startswith(prefix)}
        before = GateRows(before_ED, kept)
        entering_TD = x_TD = None
        if self.stream:
            entering_TD = self.stream.entering()
            x_TD, _ = self.stream.attend(layer, self._dense_layer(layer))
            self.stream.advance(layer)
        made = self.gating.added(before, entering_TD, x_TD)
        self.beside.update({prefix + name: t.cpu() for name, t in made.beside.items()})
        return made.rows_ED

    def random_row(self, layer: int, ffn: DenseFFN) -> Tensor:
        """A row [1, D] that knows nothing of the expert."""
        design = self.plan.design
        activations = LayerActivations(ffn, ffn.up_FD.new_empty(0, ffn.hidden_size))
        neurons_F = torch.arange(ffn.num_neurons)
        experts_EF = neurons_F.expand(design.geometry.num_experts, -1)
        rng = generator(design.seed, "router", layer)
        return route(design, activations, experts_EF, rng)[-1:]

    def tensors(
        self, unit: str, layer: int, ffn: DenseFFN, row_1D: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """What is written of a layer that gets an expert."""
        specs = self.plan.units[unit]
        parts = dict(_parts(self.plan, layer, ffn, row_1D))
        return chain(self.finished.copied(specs), self.finished.grown(specs, parts))

    def skip(self, layer: int) -> None:
        """Move the stream through a layer that gets no row."""
        if self.stream:
            self.stream.through(layer, self._dense_layer(layer))

    def _dense_layer(self, layer: int) -> dict[str, Tensor]:
        base, prefix = self.plan.source, f"model.layers.{layer}."
        target = TARGETS[self.plan.target]
        found = self.finished.read_rest(base, target, base.layer_names(layer))
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def write_grown(plan: Plan, finished: Finished, workspace: Workspace, progress: Progress) -> None:
    """Write the weights of a merge with an expert more, and what its gate leaves beside them."""
    writer = CheckpointWriter(workspace.result, plan.specs, plan.recipe.max_shard_size)
    growth = _start(plan, finished, progress)
    layers = plan.source.arch.num_layers
    for layer in range(layers):
        progress("converting layers", layer, layers)
        _write_layer(growth, workspace, writer, layer)
    progress("converting layers", layers, layers)
    for unit in plan.units:
        if unit.startswith("layer ") or unit in workspace.records:
            continue
        if unit in plan.beside.drafts:
            _write_drafts(growth, workspace, writer, unit)
            continue
        meter = _see_outer(growth) if unit == "head" else None
        write_unit(workspace, writer, unit, finished.copied(plan.units[unit]), {}, meter)
    if growth.beside:
        save_file(growth.beside, workspace.result / DOMAINS)


def write_grown_files(plan: Plan, finished: Finished, folder: Path) -> None:
    """Write config.json and what travels with a merge."""
    arch, target = plan.source.arch, TARGETS[plan.target]
    old = dict(plan.config) | target.config(arch, finished.spec(plan.spec))
    text = finished.config(assemble_config(target, old), assemble_config(target, plan.config))
    (folder / "config.json").write_text(text, "utf-8")
    copy_companions(finished.folder, folder)


def _start(plan: Plan, finished: Finished, progress: Progress) -> Growth:
    sources, gate = plan.sources, plan.design.methods.gate
    if sources is None:
        raise ValueError("the plan has no models")
    if gate is None:
        return Growth(plan, finished, sources, None, None, {})
    base, target = plan.source, TARGETS[plan.target]
    reader = open_reader(base.folder, base.config.vocab_size)
    unknown = finished.unknown
    found = added_passages(sources.merge, plan.recipe, reader, gate.name, unknown)
    grouped, reads = Grouped(found), gate.method.reads_for_more
    raw = finished.read_rest(base, target, base.outer_names())
    losses = []
    if "losses" in reads:
        models = [base, sources.models[finished.num_experts]]
        losses = _losses(models, grouped, plan, progress)
    stream = None
    if {"entering", "inputs"} & set(reads):
        stream = HiddenStream(base.config, raw, grouped.groups, plan.device)
    embed_VD = base.canonical(raw)[EMBEDDINGS]
    gating = Gating(gate, plan.design.geometry.num_experts, grouped, embed_VD, losses)
    kept = _kept(finished) if gate.name == "domain" else {}
    return Growth(plan, finished, sources, gating, stream, kept)


def _losses(models: list[Any], grouped: Grouped, plan: Plan, progress: Progress) -> list[Tensor]:
    """Of the base, in place of every expert that there is, and of the new model, [L - 1, E]."""

    def step(place: int) -> Any:
        return lambda done, total: progress("reading texts", place * total + done, 2 * total)

    base, new = (
        next_token_losses(model, grouped, plan.device, step(place))
        for place, model in enumerate(models)
    )
    return losses_of_models([*[base] * (plan.design.geometry.num_experts - 1), new])


def _kept(finished: Finished) -> dict[str, Tensor]:
    """What gate `domain` left beside the merge.

    Raises:
        UpcycleError: it is not there.
    """
    path = finished.folder / DOMAINS
    with blaming(f"{path} is not what `upcycle merge --router domain` leaves"):
        return load_file(path)


def _write_drafts(
    growth: Growth, workspace: Workspace, writer: CheckpointWriter, place: str
) -> None:
    """Write a layer that drafts tokens with an expert more, whose row is random as the others'."""
    plan = growth.plan
    layer = plan.source.arch.num_layers + plan.beside.drafts.index(place)
    ffn = growth.new_ffn(layer)
    row_1D = growth.random_row(layer, ffn).to("cpu", plan.design.dtype)
    write_unit(workspace, writer, place, growth.tensors(place, layer, ffn, row_1D), {})


def _see_outer(growth: Growth) -> Meter | None:
    """What a meter saw of all that is in no layer."""
    sources, meter = growth.sources, growth.sources.meter()
    if meter is not None:
        see_rest(sources, sources.base.outer_names(), meter)
    return meter


def _write_layer(
    growth: Growth, workspace: Workspace, writer: CheckpointWriter, layer: int
) -> None:
    """Write a layer with an expert more, unless an earlier run did; the stream goes through it in
    any case."""
    plan, finished, unit = growth.plan, growth.finished, f"layer {layer}"
    written, specs = unit in workspace.records, plan.units[unit]
    if written and growth.gating is None:
        return
    meter = None if written else growth.sources.meter()
    if meter is not None:
        see_rest(growth.sources, plan.source.layer_names(layer), meter)
    if layer not in plan.moe_layers:
        growth.skip(layer)
        if not written:
            named = finished.copied(specs)
            write_unit(workspace, writer, unit, named, {"layer": layer, "dense": True}, meter)
        return
    ffn = growth.new_ffn(layer, meter)
    before_ED = _rows(growth, specs)
    row_1D = growth.row(layer, ffn, before_ED).to("cpu", plan.design.dtype)
    if written:
        return
    named = growth.tensors(unit, layer, ffn, row_1D)
    gate = gate_facts(torch.cat([before_ED, row_1D.to(before_ED.dtype)]))
    record = {"layer": layer, "dense": False, GATE: gate}
    write_unit(workspace, writer, unit, named, record, meter)


def _rows(growth: Growth, specs: Sequence[TensorSpec]) -> Tensor:
    """The rows [E, D] of a layer's router before it grows."""
    finished, hidden = growth.finished, growth.plan.source.arch.hidden_size
    size = finished.num_experts + 1, hidden
    name = next(s.name for s in specs if s.shape == size and finished.grows(s))
    return finished.weights.read(name)


def _parts(plan: Plan, layer: int, ffn: DenseFFN, row_1D: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What the target makes of a layer in which all experts are the new one."""
    target, rows_ED = TARGETS[plan.target], row_1D.expand(plan.design.geometry.num_experts, -1)
    made = MoELayer(rows_ED, lambda expert: ffn, None)
    for name, tensor in target.experts(made, plan.design.gains):
        name = plan.source.place(layer) + name
        yield name_in_whole(target, plan.source.layout, name), tensor
