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
from upcycle.conversion.merging.sources import Sources, read_ffn
from upcycle.conversion.plan import Plan
from upcycle.conversion.units import write_unit
from upcycle.core.foreign import blaming
from upcycle.core.rng import generator
from upcycle.core.types import DenseFFN, LayerActivations, MoELayer
from upcycle.models.assemble import assemble_config
from upcycle.models.names import EMBEDDINGS
from upcycle.models.passages import Grouped, losses_of_models, next_token_losses
from upcycle.models.record import DOMAINS
from upcycle.models.source import copy_companions
from upcycle.models.stream import HiddenStream
from upcycle.models.targets import TARGETS
from upcycle.models.tokens import open_reader
from upcycle.models.writer import CheckpointWriter, TensorSpec, Workspace
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

    def row(self, layer: int, ffn: DenseFFN, before_ED: Tensor) -> Tensor:
        """The new expert's row [1, D] of one layer; moves the stream to the next layer.

        Args:
            ffn: the new expert's.
            before_ED: the rows that there are.
        """
        design = self.plan.design
        if self.gating is None:
            rows = design.geometry.num_experts, ffn.num_neurons
            activations = LayerActivations(ffn, ffn.up_FD.new_empty(0, ffn.hidden_size))
            rng = generator(design.seed, "router", layer)
            experts_EF = torch.arange(ffn.num_neurons).expand(rows)
            return route(design, activations, experts_EF, rng)[-1:]
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

    def skip(self, layer: int) -> None:
        """Move the stream through a layer that gets no row."""
        if self.stream:
            self.stream.through(layer, self._dense_layer(layer))

    def _dense_layer(self, layer: int) -> dict[str, Tensor]:
        base, prefix = self.plan.source, f"model.layers.{layer}."
        target = TARGETS[self.plan.target]
        found = self.finished.read_rest(base, target, base.layer_names(layer))
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def write_grown(plan: Plan, finished: Finished, workspace: Workspace, progress: Any) -> None:
    """Write the weights of a merge with an expert more, and what its gate leaves beside them."""
    writer = CheckpointWriter(workspace.result, plan.specs, plan.recipe.max_shard_size)
    growth = _start(plan, finished, progress)
    layers = plan.source.arch.num_layers
    for layer in range(layers):
        progress("converting layers", layer, layers)
        _write_layer(growth, workspace, writer, layer)
    progress("converting layers", layers, layers)
    for unit in plan.units:
        if not unit.startswith("layer ") and unit not in workspace.records:
            write_unit(workspace, writer, unit, finished.copied(plan.units[unit]), {})
    if growth.beside:
        save_file(growth.beside, workspace.result / DOMAINS)


def write_grown_files(plan: Plan, finished: Finished, folder: Path) -> None:
    """Write config.json and what travels with a merge."""
    arch, target = plan.source.arch, TARGETS[plan.target]
    old = dict(plan.config) | target.config(arch, finished.spec(plan.spec))
    text = finished.config(assemble_config(target, old), assemble_config(target, plan.config))
    (folder / "config.json").write_text(text, "utf-8")
    copy_companions(finished.folder, folder)


def _start(plan: Plan, finished: Finished, progress: Any) -> Growth:
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


def _losses(models: list[Any], grouped: Grouped, plan: Plan, progress: Any) -> list[Tensor]:
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


def _write_layer(
    growth: Growth, workspace: Workspace, writer: CheckpointWriter, layer: int
) -> None:
    """Write a layer with an expert more, unless an earlier run did; the stream goes through it in
    any case."""
    plan, finished, unit = growth.plan, growth.finished, f"layer {layer}"
    written, specs = unit in workspace.records, plan.units[unit]
    if written and growth.gating is None:
        return
    if layer not in plan.moe_layers:
        growth.skip(layer)
        if not written:
            write_unit(workspace, writer, unit, finished.copied(specs), _record(layer, dense=True))
        return
    ffn = read_ffn(growth.sources.models[finished.num_experts], layer, plan.activation)
    row_1D = growth.row(layer, ffn, _rows(growth, specs))
    if written:
        return
    parts = dict(_parts(plan, layer, ffn, row_1D.to("cpu", plan.design.dtype)))
    named = chain(finished.copied(specs), finished.grown(specs, parts))
    write_unit(workspace, writer, unit, named, _record(layer, dense=False))


def _rows(growth: Growth, specs: Sequence[TensorSpec]) -> Tensor:
    """The rows [E, D] of a layer's router before it grows."""
    finished, hidden = growth.finished, growth.plan.source.arch.hidden_size
    name = next(s.name for s in specs if s.shape == (finished.num_experts + 1, hidden))
    return finished.weights.read(name)


def _parts(plan: Plan, layer: int, ffn: DenseFFN, row_1D: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What the target makes of a layer in which all experts are the new one."""
    rows_ED = row_1D.expand(plan.design.geometry.num_experts, -1)
    made = MoELayer(rows_ED, lambda expert: ffn, None)
    for name, tensor in TARGETS[plan.target].experts(made, plan.design.gains):
        yield plan.source.layout.full(f"model.layers.{layer}.{name}"), tensor


def _record(layer: int, *, dense: bool) -> dict[str, Any]:
    return {"layer": layer, "dense": dense}
