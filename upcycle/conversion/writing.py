"""What a conversion writes: the small files, and the weights layer by layer, as they are made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from upcycle.conversion.converted import ConvertedLayer
from upcycle.conversion.fit.loop import Tell
from upcycle.conversion.gradients import loss_gradient
from upcycle.conversion.layer import convert_layer
from upcycle.conversion.merging.gates import Gates, make_gates
from upcycle.conversion.plan import Plan
from upcycle.conversion.units import GATE, PARTS, write_unit
from upcycle.core.progress import Progress
from upcycle.core.types import DenseFFN, LayerActivations, LossGradient
from upcycle.evaluation.distance import Meter
from upcycle.models.assemble import (
    assemble_config,
    assemble_embeddings,
    assemble_head,
    assemble_layer,
    dense_ffn,
    in_whole,
)
from upcycle.models.companions import copy_companions
from upcycle.models.holders import HOLDERS
from upcycle.models.names import EMBEDDINGS
from upcycle.models.record.file import DOMAINS
from upcycle.models.stream import HiddenStream
from upcycle.models.targets import TARGETS
from upcycle.models.targets.base import Whole
from upcycle.models.workspace import Workspace
from upcycle.models.writer import CheckpointWriter


def write_small_files(plan: Plan, folder: Path) -> None:
    """Write config.json and what travels with the source."""
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


def write_weights(plan: Plan, workspace: Workspace, fit_BL: Tensor, progress: Progress) -> None:
    """Write all tensors, as far as no earlier run did.

    Args:
        fit_BL: the calibration tokens.
    """
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
        converted = take_up(plan, workspace, unit, ffn)
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


def take_up(plan: Plan, workspace: Workspace, unit: str, ffn: DenseFFN) -> ConvertedLayer:
    """A layer that is done, by this run or an earlier one; `ffn` is the source's."""
    refit: dict[str, Any] = workspace.kept(unit)
    router_ED = refit.pop("router")
    permutation = torch.tensor(workspace.records[unit]["permutation"])
    ffn = ffn.to("cpu", plan.design.dtype)
    return plan.way.take_up(plan.design, ffn, permutation, router_ED, refit)
