"""From a request to its plan: every decision made and every foreseeable error raised.

Reads headers, never weights, and writes nothing.
"""

from dataclasses import replace
from pathlib import Path

import torch

from upcycle.conversion.beside import Beside
from upcycle.conversion.design import Methods
from upcycle.conversion.designing import bound_methods, choose_combine, design_of
from upcycle.conversion.dry_run import active_params, planned_config, planned_units
from upcycle.conversion.feasibility import check_plan
from upcycle.conversion.merging.finished import Finished
from upcycle.conversion.merging.request import Merge
from upcycle.conversion.merging.sources import Sources
from upcycle.conversion.notes import layout_notes, source_notes, warnings
from upcycle.conversion.plan import Plan
from upcycle.conversion.recipe import Recipe
from upcycle.conversion.request import named_dense_layers, suited
from upcycle.conversion.runtimes import for_runtimes, runtime_refusals
from upcycle.conversion.target import choose_target, reached, refusals
from upcycle.conversion.ways import WAYS, Room, Way
from upcycle.core.machine import choose_device, free_memory
from upcycle.core.paths import local_path
from upcycle.core.settings import Choice
from upcycle.core.types import Geometry
from upcycle.models.source import DenseSource
from upcycle.models.targets import TARGETS, MoESpec
from upcycle.models.text import texts
from upcycle.models.traits import Architecture

WRITING = 1.5  # times its weights is what a model takes in memory that writes text


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
    methods = bound_methods(recipe, way, sources, finished)
    recipe = suited(recipe, source, merges=way.several)
    dense_layers, asked = named_dense_layers(recipe, source), source
    merge = sources.merge if sources else None
    source, arch, targets = _laid_out(recipe, source, dense_layers, merge)
    target = choose_target(recipe, way, arch, targets)
    room = Room.of(arch, TARGETS[target], len(dense_layers))
    geometry = way.geometry(recipe, room)
    combine = choose_combine(recipe, way, geometry, target, targets)
    design = design_of(recipe, way, methods, source, target, geometry, combine, room, merge)
    spec = MoESpec(geometry, design.gains, dense_layers)
    device = choose_device(recipe.device)
    calibration, left_out = _calibration(recipe, way, source, device)
    beside = Beside.of(source, fitted=design.streams)
    units = planned_units(source, target, spec, design.dtype, beside)
    layers = room.layers - len(dense_layers) + len(beside.drafts)
    said = (*source_notes(source, design.dtype), *layout_notes(asked, arch, target, spec))
    said += (*beside.notes(), *warnings(recipe, way, spec, target, design, reached(targets)))
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
        config=planned_config(arch, target, spec, design.dtype) | beside.count,
        device=device,
        beside=beside,
        units=units,
        params_dense=sum(torch.Size(i.shape).numel() for i in source.tensors.values()),
        params_active=active_params(units, geometry, arch, TARGETS[target], layers),
        warnings=(*notes, *said, *left_out),
        runtimes=runtime_refusals(recipe, arch, target, spec, combine),
        sources=sources,
        finished=finished,
    )
    check_plan(plan, overwrite=overwrite, resume=resume)
    return plan


def _laid_out(
    recipe: Recipe, source: DenseSource, dense_layers: tuple[int, ...], merge: Merge | None
) -> tuple[DenseSource, Architecture, dict[str, str]]:
    """The source and what it is as it is written, its output embeddings tied or not, and every
    target, with why it can't be chosen."""
    arch = source.arch.untied() if recipe.untied and source.arch.tied else source.arch
    hosts = refusals(arch, recipe, dense_layers, merge)
    arch, targets = for_runtimes(recipe, arch, hosts)
    return replace(source, arch=arch), arch, targets


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
