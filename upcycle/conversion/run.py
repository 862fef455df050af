"""The conversion: layer by layer, from the dense source to a checkpoint that is whole or absent."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from upcycle.conversion.card import Conversion, conversion_record, model_card
from upcycle.conversion.check import dtype_that_fits, run_check
from upcycle.conversion.converted import ConvertedLayer
from upcycle.conversion.dense_layers import choose_dense_layers
from upcycle.conversion.fit.learn import said
from upcycle.conversion.fit.loop import Tell
from upcycle.conversion.gradients import loss_gradient, put_gradients_aside
from upcycle.conversion.growing import write_grown, write_grown_files
from upcycle.conversion.layer import convert_layer
from upcycle.conversion.merging.findings import findings, measure_beside
from upcycle.conversion.merging.finished import check_base
from upcycle.conversion.merging.gates import Gates, make_gates
from upcycle.conversion.merging.own_texts import own_texts
from upcycle.conversion.plan import Plan
from upcycle.conversion.planning import make_plan
from upcycle.conversion.units import GATE, PARTS, SEEN, write_unit
from upcycle.core.errors import CheckFailed, UpcycleError
from upcycle.core.machine import peak_memory, torch_threads
from upcycle.core.types import DenseFFN, LayerActivations, LossGradient
from upcycle.core.versions import versions
from upcycle.evaluation.distance import Meter
from upcycle.models.assemble import (
    assemble_config,
    assemble_embeddings,
    assemble_head,
    assemble_layer,
    dense_ffn,
    in_whole,
)
from upcycle.models.calibration import Calibration, calibration, text_fingerprint
from upcycle.models.companions import copy_companions
from upcycle.models.holders import HOLDERS
from upcycle.models.names import EMBEDDINGS
from upcycle.models.record import (
    DOMAINS,
    RECORD,
    DenseLayers,
    FitPart,
    Identity,
    Report,
    record_text,
)
from upcycle.models.stream import HiddenStream
from upcycle.models.targets import TARGETS
from upcycle.models.targets.base import Whole
from upcycle.models.writer import (
    CheckpointWriter,
    Workspace,
    begun_run,
    check_unfinished,
    recorded_run,
)

DENSE_LAYERS = "layers to keep dense"


class Progress(Protocol):
    """Told of every step of a stage."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def run(
    plan: Plan,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Conversion:
    """Carry out a plan.

    Args:
        overwrite: replace a former output at `plan.out`, once the new one is whole.
        resume: go on from the last finished layer of an earlier run, and leave finished layers
            in place if this one stops. The result has the same bytes as an uninterrupted run.
        progress: called as stages move.

    Raises:
        AlreadyFinished: the run to resume has left its result.
        UpcycleError: the input is wrong in a way that only its weights or text show.
        CheckFailed: the result broke an invariant; nothing is published.
    """
    if plan.out is None:
        raise ValueError("the plan has no output folder")
    for source in plan.checkpoints:
        source.fetch()
    if plan.finished is not None:
        check_base(plan.source, plan.finished)
    begun = None
    if resume:
        # What is there was made by a run with its own number of threads.
        made = recorded_run(plan.out)
        check_unfinished(plan.out, identity(plan, made.threads if made else 1), overwrite=overwrite)
        begun = begun_run(plan.out)
    threads = begun.threads if begun else torch.get_num_threads()
    with torch_threads(threads):
        workspace = Workspace(plan.out, identity(plan, threads), resume=resume)
        try:
            conversion = _fill(plan, plan.out, workspace, progress)
            workspace.publish(overwrite=overwrite)
        except BaseException:
            workspace.abandon()
            raise
    return conversion


def identity(plan: Plan, threads: int) -> Identity:
    """Of a run with so many threads: everything that the output's bytes depend on."""
    ingredients = {
        "source": plan.source.fingerprint(),
        "text": text_fingerprint(plan.source.folder, plan.recipe.calibration),
        # Which texts `mixed` stands for depends on the memory that is free.
        "recipe": plan.request.settings() | {"calibration": plan.recipe.calibration},
        "versions": versions(),
        "threads": threads,
    }
    if plan.sources is not None:
        merge = plan.sources.merge
        ingredients["merge"] = merge.settings()
        ingredients["texts"] = [
            text_fingerprint(plan.source.folder, e.text) for e in merge.experts if e.text
        ]
        ingredients["sources"] = plan.sources.fingerprints()
    if plan.finished is not None:
        ingredients["finished"] = plan.finished.weights.fingerprint()
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
    return Identity(digest, threads)


def _fill(plan: Plan, out: Path, workspace: Workspace, progress: Progress) -> Conversion:
    clock = time.monotonic()
    seconds: dict[str, float] = {}

    def lap(stage: str) -> None:
        seconds[stage] = time.monotonic() - clock - sum(seconds.values())

    tokens, own = _tokens(plan, progress), own_texts(plan)
    fit_BL = tokens.fit_BL
    lap("calibration text")
    if plan.needs_gradients:
        put_gradients_aside(plan, fit_BL, workspace, progress)
        lap("backward pass")
    if plan.undecided:
        plan = _decide(plan, workspace, tokens, progress)
        lap(DENSE_LAYERS)
    if plan.finished is not None:
        write_grown_files(plan, plan.finished, workspace.result)
        write_grown(plan, plan.finished, workspace, progress)
    else:
        _write_small_files(plan, workspace.result)
        _write_weights(plan, workspace, fit_BL, progress)
    lap("conversion")
    peak = peak_memory()
    check = beside = None
    if plan.recipe.check != "none":
        check = _check(plan, workspace, {**tokens.held, **own.windows}, progress)
        beside = measure_beside(plan, check, own, dtype_that_fits(plan), progress)
        lap("check")
    chosen = workspace.records.get(DENSE_LAYERS)
    dense_layers = None if chosen is None else TypeAdapter(DenseLayers).validate_python(chosen)
    units = [workspace.records[unit] for unit in plan.units if unit in workspace.records]
    found = findings(plan, units, beside)
    learned = said(
        [FitPart(**unit["fit"]) for unit in units if "fit" in unit], plan.design.geometry.top_k
    )
    conversion = Conversion(
        plan, workspace.run, out, check, seconds, peak, dense_layers, found, learned
    )
    layers = [
        {name: value for name, value in unit.items() if name not in (SEEN, GATE)}
        for unit in units
        if "layer" in unit
    ]
    record = record_text(conversion_record(conversion, layers))
    (workspace.result / RECORD).write_text(record, "utf-8")
    (workspace.result / "README.md").write_text(model_card(conversion), "utf-8")
    return conversion


def _check(
    plan: Plan, workspace: Workspace, held: Mapping[str, Tensor], progress: Progress
) -> Report:
    """`run_check`, by a source that is still the same: transformers reads it anew.

    Raises:
        UpcycleError: it is not.
    """
    try:
        report = run_check(plan, workspace.result, held, progress, _all_on(plan, workspace))
    except (CheckFailed, UpcycleError):
        plan.source.verify()
        raise
    plan.source.verify()
    return report


def _decide(plan: Plan, workspace: Workspace, tokens: Calibration, progress: Progress) -> Plan:
    """The plan with the layers that are to stay dense, by measurement."""
    if DENSE_LAYERS not in workspace.records:
        gradients = partial(loss_gradient, plan, workspace)
        chosen = choose_dense_layers(plan, tokens.fit_BL, tokens.front, gradients, progress)
        workspace.done(DENSE_LAYERS, asdict(chosen))
    layers = tuple(workspace.records[DENSE_LAYERS]["layers"])
    decided = {"keep_dense": layers, "target": plan.target, "calibration": plan.recipe.calibration}
    return make_plan(plan.source, plan.request.model_copy(update=decided))


def _all_on(plan: Plan, workspace: Workspace) -> Iterator[tuple[int, DenseFFN]]:
    """The layers of which all experts together are not the source's FFN, with the FFN that they
    come to: for pruned copies, a wider one."""
    if plan.exact != "all on" or (plan.partitions and not plan.design.refits):
        return
    for layer in plan.moe_layers:
        ffn = dense_ffn(plan.source.canonical(plan.source.read_layer(layer)), plan.activation)
        yield layer, _take_up(plan, workspace, f"layer {layer}", ffn).all_on()


def _tokens(plan: Plan, progress: Progress) -> Calibration:
    recipe = plan.recipe
    return calibration(
        plan.source,
        recipe.calibration,
        sequences=plan.fit_tokens // recipe.seq_len,
        windows=plan.check_windows,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        device=plan.device,
        progress=progress,
    )


def _write_small_files(plan: Plan, folder: Path) -> None:
    config = assemble_config(TARGETS[plan.target], plan.config)
    if plan.source.arch.whole:
        config = _whole_config(plan, config)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, "utf-8")
    copy_companions(plan.source.folder, folder)


def _whole_config(plan: Plan, text: dict[str, Any]) -> dict[str, Any]:
    """The config of the model that the result's text model is a part of."""
    source = plan.source.layout.config
    whole = TARGETS[plan.target].whole
    if source.model_type in HOLDERS:
        (architecture,) = source.architectures
        whole = Whole(source.model_type, architecture)
    if whole is None:
        raise ValueError(f"{plan.target} has no place for other parts")
    made = {name: value for name, value in plan.config.items() if name != "model_type"}
    part: PreTrainedConfig = CONFIG_MAPPING[plan.config["model_type"]](**made)
    fields = source.to_dict() | {
        "text_config": part.to_dict(),
        "architectures": [whole.architecture],
        "tie_word_embeddings": plan.source.arch.tied,
        "dtype": plan.config["dtype"],
    }
    for name, model_type in whole.parts.items():
        fields[name] = fields[name] | {"model_type": model_type}
    del fields["model_type"]
    config: PreTrainedConfig = CONFIG_MAPPING[whole.model_type](**fields)
    written: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return written | {"text_config": text | written["text_config"]}


def _write_weights(plan: Plan, workspace: Workspace, fit_BL: Tensor, progress: Progress) -> None:
    source = plan.source
    writer = CheckpointWriter(workspace.result, plan.specs, plan.recipe.max_shard_size)
    meter = plan.sources.meter() if plan.sources else None
    raw = plan.read(source.outer_names(), meter)
    outer = source.canonical(raw)
    stream = dense = None
    gates = make_gates(plan, outer[EMBEDDINGS], progress)
    if plan.streams or gates:
        tokens = gates.tokens if gates else fit_BL
        stream = HiddenStream(source.config, raw, tokens, plan.device)
    if plan.design.feedback:
        dense = HiddenStream(source.config, raw, fit_BL, plan.device)
    target = TARGETS[plan.target]
    before = in_whole(target, source.layout, assemble_embeddings(target, outer))
    after = in_whole(target, source.layout, assemble_head(target, source.arch, outer))
    write_unit(workspace, writer, "embeddings", before, {})
    write_unit(workspace, writer, "head", after, {}, meter)
    del raw, outer
    layers = source.arch.num_layers
    for layer in range(layers):
        progress("converting layers", layer, layers)
        if layer > max(plan.moe_layers):
            stream = dense = None  # nobody looks at what comes after
        _write_layer(plan, workspace, writer, stream, dense, gates, layer, progress)
    _write_beside(plan, workspace, writer)
    progress("converting layers", layers, layers)
    if gates and gates.beside:
        save_file(gates.beside, workspace.result / DOMAINS)


def _write_beside(plan: Plan, workspace: Workspace, writer: CheckpointWriter) -> None:
    """Write what is not the text model's, unless an earlier run did."""
    source, target = plan.source, TARGETS[plan.target]
    for number, place in enumerate(plan.beside.drafts, source.arch.num_layers):
        if place in workspace.records:
            continue
        names = [name for name in source.draft_names() if name.startswith(place)]
        tensors = source.canonical(source.read_place(place, names))
        converted = convert_layer(plan, number, dense_ffn(tensors, plan.activation))
        moe = converted.experts(plan.design, number)
        named = assemble_layer(target, source.arch, place, tensors, moe, plan.design.gains)
        write_unit(workspace, writer, place, named, {})
    if plan.beside.kept and PARTS not in workspace.records:
        stored = source.layout.stored
        kept = ((stored(name), source.read([name])[name]) for name in plan.beside.kept)
        write_unit(workspace, writer, PARTS, kept, {})


def _write_layer(
    plan: Plan,
    workspace: Workspace,
    writer: CheckpointWriter,
    stream: HiddenStream | None,
    dense: HiddenStream | None,
    gates: Gates | None,
    layer: int,
    progress: Progress,
) -> None:
    """Convert a layer, unless an earlier run did. (A function of its own, so that its tensors are
    gone before the next layer's are read.)

    Args:
        stream: the tokens on their way through the converted layers, if any method looks at them.
        dense: the same through the dense model, if the plan has feedback.
        gates: make the router of what goes through the stream, if text makes it.
    """
    unit = f"layer {layer}"
    finished = unit in workspace.records
    if finished and stream is None:
        return
    meter = plan.sources.meter() if plan.sources and not finished else None
    raw = plan.read_layer(layer, meter)
    tensors = plan.source.canonical(raw)
    if layer not in plan.source.arch.ffn_layers:
        for each in filter(None, (stream, dense)):
            each.through(layer, raw)
        if not finished:
            _write_converted(plan, workspace, writer, layer, tensors, None, meter)
        return
    ffn = dense_ffn(tensors, plan.activation)
    entering_TD = stream.entering() if stream and gates else None
    converts = layer in plan.moe_layers and not finished
    loss = loss_gradient(plan, workspace, layer) if converts else None
    activations, norm_T = _attend(layer, raw, ffn, stream, dense, loss)
    gate_ED = None
    if gates and activations is not None and entering_TD is not None:
        gate_ED = gates.rows(layer, entering_TD, activations.x_TD)
    converted = None
    if converts:
        wanted_TD = _wanted(plan, stream, dense)
        converted = convert_layer(
            plan,
            layer,
            ffn,
            activations,
            norm_T,
            wanted_TD,
            gate_ED,
            meter,
            _tell(plan, layer, progress),
        )
    elif layer in plan.moe_layers and plan.design.sequential:
        converted = _take_up(plan, workspace, unit, ffn)
    if stream:
        stream.advance(layer, _output(plan, converted, activations))
    if not finished:
        _write_converted(plan, workspace, writer, layer, tensors, converted, meter)


def _tell(plan: Plan, layer: int, progress: Progress) -> Tell:
    """Told of the steps of one layer's fit, tells of those of all."""
    place, layers = plan.moe_layers.index(layer), len(plan.moe_layers)
    return lambda done, steps: progress("learning", place * steps + done, layers * steps)


def _attend(
    layer: int,
    raw: Mapping[str, Tensor],
    ffn: DenseFFN,
    stream: HiddenStream | None,
    dense: HiddenStream | None,
    loss: LossGradient | None,
) -> tuple[LayerActivations | None, Tensor | None]:
    """Move the stream up to a layer's FFN, and the dense one past it; what the FFN sees, and the
    norms [T] of what its output is added to."""
    if dense:
        dense.through(layer, raw)
    if stream is None:
        return None, None
    x_TD, norm_T = stream.attend(layer, raw)
    wide = ffn.to(x_TD.device, torch.float32)
    return LayerActivations(wide, x_TD.float(), loss=loss), norm_T


def _wanted(plan: Plan, stream: HiddenStream | None, dense: HiddenStream | None) -> Tensor | None:
    """What the output of a layer's FFN is to make up for besides, [T, D], if the plan has
    feedback: what the layers already converted lack of the dense model's."""
    if stream is None or dense is None:
        return None
    return stream.lag(dense).div_(plan.source.arch.fields["residual_multiplier"])


def _output(
    plan: Plan, converted: ConvertedLayer | None, activations: LayerActivations | None
) -> Tensor | None:
    """What takes the place of the dense FFN's output for the layers after it, [T, D], if they are
    fitted on that."""
    if converted is None or activations is None or not plan.design.sequential:
        return None
    return converted.output(activations, plan.design.weigh)


def _write_converted(
    plan: Plan,
    workspace: Workspace,
    writer: CheckpointWriter,
    layer: int,
    tensors: dict[str, Tensor],
    converted: ConvertedLayer | None,
    meter: Meter | None,
) -> None:
    """Write a layer with its experts, or as it was, and what is known of it; `meter` is what is
    shown the models' tensors, of a merge."""
    unit, target = f"layer {layer}", TARGETS[plan.target]
    record = _put_aside(plan, workspace, unit, converted)
    moe = converted.experts(plan.design, layer) if converted else None
    arch, place = plan.source.arch, f"model.layers.{layer}."
    named = assemble_layer(target, arch, place, tensors, moe, plan.design.gains)
    in_place = in_whole(target, plan.source.layout, named)
    write_unit(workspace, writer, unit, in_place, {"layer": layer} | record, meter)


def _put_aside(
    plan: Plan, workspace: Workspace, unit: str, converted: ConvertedLayer | None
) -> dict[str, Any]:
    """What upcycle.json keeps of a layer; and for the time of the run, what a resumed stream and
    the check need."""
    if converted is None or not plan.way.kept_neurons(plan.design.geometry):
        gate = converted.gate if converted else {}
        return {"dense": converted is None} | ({GATE: gate} if gate else {})
    refit = {name: getattr(converted.ffn, name) for name in _refit(plan, converted.ffn)}
    workspace.keep(unit, {"router": converted.router_ED} | refit)
    fit = {"fit": converted.fit.plain()} if converted.fit else {}
    return {"dense": False, "permutation": converted.permutation.tolist()} | fit


def _refit(plan: Plan, ffn: DenseFFN) -> list[str]:
    """The matrices of an FFN that the plan refits."""
    return [name for name in ffn.matrices if name in plan.design.refits]


def _take_up(plan: Plan, workspace: Workspace, unit: str, ffn: DenseFFN) -> ConvertedLayer:
    """A layer that is done, by this run or an earlier one; `ffn` is the source's."""
    refit: dict[str, Any] = workspace.kept(unit)
    router_ED = refit.pop("router")
    permutation = torch.tensor(workspace.records[unit]["permutation"])
    ffn = ffn.to("cpu", plan.design.dtype)
    return plan.way.take_up(plan.design, ffn, permutation, router_ED, refit)
