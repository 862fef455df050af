"""The conversion: layer by layer, from the dense source to a checkpoint that is whole or absent."""

import hashlib
import json
import resource
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.activations import ACT2FN

from upcycle.assemble import (
    EMBEDDINGS,
    assemble_embeddings,
    assemble_head,
    assemble_layer,
    dense_ffn,
)
from upcycle.calibrate import calibration_tokens
from upcycle.check import run_check
from upcycle.dense import HiddenStream
from upcycle.perturb import PERTURBS
from upcycle.planning import Plan, parameters
from upcycle.recipe import Choice
from upcycle.report import Conversion, model_card, report_json, versions
from upcycle.rng import generator
from upcycle.router_init import ROUTERS
from upcycle.shared_experts import SHARED
from upcycle.sink import CheckpointWriter, Workspace
from upcycle.source import companions
from upcycle.split import SPLITS
from upcycle.targets import TARGETS
from upcycle.types import DenseFFN, ExpertLayout, LayerActivations, MoELayer

# Small enough that softmax weights are equal, large enough that no selection flips; float16 can't
# hold smaller router weights (measured in tests/test_exactness.py).
TEMPERATURE = {torch.float16: 1e-3}
DEFAULT_TEMPERATURE = 1e-4


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
        UpcycleError: the input is wrong in a way that only its weights or text show.
        CheckFailed: the result broke an invariant; nothing is published.
    """
    if plan.out is None:
        raise ValueError("the plan has no output folder")
    workspace = Workspace(plan.out, fingerprint(plan), resume=resume)
    try:
        conversion = _fill(plan, plan.out, workspace, progress)
        workspace.publish(overwrite=overwrite)
    except BaseException:
        workspace.abandon()
        raise
    return conversion


def fingerprint(plan: Plan) -> str:
    """Of everything that the output's bytes depend on."""
    ingredients = {
        "source": plan.source.fingerprint(),
        "recipe": plan.recipe.settings(),
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def _fill(plan: Plan, out: Path, workspace: Workspace, progress: Progress) -> Conversion:
    clock = time.monotonic()
    seconds: dict[str, float] = {}

    def lap(stage: str) -> None:
        seconds[stage] = time.monotonic() - clock - sum(seconds.values())

    fit_BL, held_BL = _tokens(plan)
    lap("calibration text")
    _write_small_files(plan, workspace.folder)
    _write_weights(plan, workspace, fit_BL, progress)
    lap("conversion")
    peak = peak_memory()
    check = None
    if plan.recipe.check != "none":
        check = run_check(plan, workspace.folder, held_BL, progress)
        lap("check")
    conversion = Conversion(plan, out, check, seconds, peak)
    records = [workspace.records[unit] for unit in plan.units if unit.startswith("layer ")]
    (workspace.folder / "upcycle.json").write_text(report_json(conversion, records))
    (workspace.folder / "README.md").write_text(model_card(conversion))
    return conversion


def _tokens(plan: Plan) -> tuple[Tensor, Tensor]:
    """Sequences to fit on, and sequences held back for the check."""
    seq_len = plan.recipe.seq_len
    fit, held = plan.fit_tokens // seq_len, plan.held_tokens // seq_len
    if fit + held == 0:
        return torch.empty(0, seq_len), torch.empty(0, seq_len)
    recipe = plan.recipe
    tokens_BL = calibration_tokens(
        plan.source, recipe.calibration, fit + held, seq_len, recipe.seed
    )
    return tokens_BL[:fit], tokens_BL[fit:]


def _write_small_files(plan: Plan, folder: Path) -> None:
    fields = {k: v for k, v in plan.config.items() if k != "model_type"}
    CONFIG_MAPPING[plan.target](**fields).save_pretrained(folder)
    for path in companions(plan.source.folder):
        shutil.copyfile(path, folder / path.name)


def _write_weights(plan: Plan, workspace: Workspace, fit_BL: Tensor, progress: Progress) -> None:
    source, target = plan.source, TARGETS[plan.target]
    writer = CheckpointWriter(workspace.folder, plan.specs, plan.recipe.max_shard_size)

    def write(unit: str, named: Any, record: dict[str, Any]) -> None:
        for name, tensor in named:
            writer.write(name, tensor.to(plan.dtype) if tensor.dtype == source.dtype else tensor)
        workspace.done(unit, record)

    outer = source.canonical(source.read(source.outer_names()))
    stream = None
    if plan.streams:
        stream = HiddenStream(source.config, outer[EMBEDDINGS], fit_BL, plan.device)
    write("embeddings", assemble_embeddings(outer), {})
    write("head", assemble_head(outer), {})
    del outer
    layers = source.arch.num_layers
    for layer in range(layers):
        progress("converting layers", layer, layers)
        unit = f"layer {layer}"
        if unit in workspace.records and stream is None:
            continue
        raw = source.read_layer(layer)
        x_TD = stream.step(layer, raw) if stream else None
        if unit in workspace.records:
            continue
        tensors = source.canonical(raw)
        moe, record = None, {"layer": layer, "dense": True}
        if layer not in plan.spec.dense_layers:
            ffn = dense_ffn(tensors, ACT2FN[source.arch.fields["hidden_act"]])
            moe, layout = convert_layer(plan, layer, ffn, x_TD)
            record = {"layer": layer, "dense": False} | _layout_record(plan, layout)
        named = assemble_layer(target, source.arch, layer, tensors, moe, plan.gains)
        write(unit, named, record)
    progress("converting layers", layers, layers)


def convert_layer(
    plan: Plan, layer: int, ffn: DenseFFN, x_TD: Tensor | None
) -> tuple[MoELayer, ExpertLayout]:
    """Turn one dense FFN into experts and a router.

    Args:
        ffn: in the source's dtype.
        x_TD: what the FFN sees on the calibration tokens, if the plan streams them.
    """
    if x_TD is None:
        activations = LayerActivations(ffn, ffn.gate_FD.new_empty(0, ffn.hidden_size))
    else:
        activations = LayerActivations(ffn.to(x_TD.device, torch.float32), x_TD.float())
    with torch.no_grad():
        make = _copy_layer if plan.recipe.copies else _split_layer
        router_ED, layout = make(plan, layer, activations)
        if plan.combine == "sum":
            router_ED = temper(router_ED, activations.x_TD, plan.dtype)
    shared = ffn.take(layout.shared_S) if len(layout.shared_S) else None
    expert = _Experts(plan, layer, ffn, layout)
    return MoELayer(router_ED.to("cpu", plan.dtype), expert, shared), layout


def _split_layer(
    plan: Plan, layer: int, activations: LayerActivations
) -> tuple[Tensor, ExpertLayout]:
    """Take the shared neurons out, cut the rest into experts, fit the router."""
    recipe, num_neurons = plan.recipe, activations.ffn.num_neurons
    score_F = torch.zeros(num_neurons)
    if plan.spec.shared_size:
        params = parameters(SHARED, recipe.shared_by)
        score_F = SHARED[recipe.shared_by.name].run(activations, params).cpu()
    order_F = score_F.argsort(descending=True, stable=True)
    shared_S = order_F[: plan.spec.shared_size].sort().values
    routed_R = order_F[plan.spec.shared_size :].sort().values
    routed = activations.take(routed_R)
    members_EM = SPLITS[recipe.split.name].run(
        routed,
        plan.geometry.routed_experts,
        parameters(SPLITS, recipe.split),
        generator(recipe.seed, "split", layer),
    )
    router_ED = _route(plan, layer, routed, members_EM)
    return router_ED, ExpertLayout(routed_R[members_EM], shared_S)


def _copy_layer(
    plan: Plan, layer: int, activations: LayerActivations
) -> tuple[Tensor, ExpertLayout]:
    """N copies of G shards; a copy's shards share a router row, so they are chosen together
    (NVIDIA's virtual groups, arXiv:2410.07524)."""
    geometry = plan.geometry
    neurons_F = torch.arange(activations.ffn.num_neurons)
    copies_NF = neurons_F.expand(geometry.num_experts, -1)
    router_ND = _route(plan, layer, activations, copies_NF)
    shards_GM = neurons_F.view(geometry.granularity, -1)
    layout = ExpertLayout(shards_GM.repeat(geometry.num_experts, 1), neurons_F[:0])
    return router_ND.repeat_interleave(geometry.granularity, dim=0), layout


def _route(plan: Plan, layer: int, activations: LayerActivations, experts_EM: Tensor) -> Tensor:
    choice = plan.recipe.router or Choice(name="ridge")
    rng = generator(plan.recipe.seed, "router", layer)
    return ROUTERS[choice.name].run(activations, experts_EM, parameters(ROUTERS, choice), rng)


def temper(router_ED: Tensor, x_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """The router scaled so that a token's logits spread by τ: its weights become equal.

    Args:
        x_TD: calibration inputs, by which the spread is measured.
        dtype: in which the router will be stored.
    """
    logits_TE = x_TD.float() @ router_ED.to(x_TD.device).float().T
    spread = logits_TE.std(dim=1, correction=0).mean().item()
    tau = TEMPERATURE.get(dtype, DEFAULT_TEMPERATURE)
    return router_ED * (tau / spread if spread > 0 else tau)


@dataclass(frozen=True)
class _Experts:
    """Makes expert e when asked, so that copies never lie in memory together."""

    plan: Plan
    layer: int
    ffn: DenseFFN
    layout: ExpertLayout

    def __call__(self, expert: int) -> DenseFFN:
        neurons_M = self.layout.experts_EM[expert]
        whole = len(neurons_M) == self.ffn.num_neurons and self.plan.recipe.copies
        ffn = self.ffn if whole else self.ffn.take(neurons_M)
        method = self.plan.recipe.method
        if method.name not in PERTURBS:
            return ffn
        rng = generator(self.plan.recipe.seed, f"perturb expert {expert}", self.layer)
        changed = PERTURBS[method.name].run(ffn, parameters(PERTURBS, method), rng)
        return replace(changed, act=ffn.act)


def _layout_record(plan: Plan, layout: ExpertLayout) -> dict[str, Any]:
    """What upcycle.json keeps: the permutation of a split, enough to undo it."""
    if plan.recipe.copies:
        return {}
    return {"permutation": layout.permutation.tolist()}


def peak_memory() -> int:
    """Peak resident bytes of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
