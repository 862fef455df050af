"""The conversion in its stages, from the dense source to a checkpoint that is whole or absent."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from upcycle.conversion.card import Conversion, conversion_record, model_card
from upcycle.conversion.check import dtype_that_fits, run_check
from upcycle.conversion.dense_layers import choose_dense_layers
from upcycle.conversion.fit.learn import idle, said
from upcycle.conversion.gradients import loss_gradient, put_gradients_aside
from upcycle.conversion.growing import write_grown, write_grown_files
from upcycle.conversion.merging.findings import findings, measure_beside
from upcycle.conversion.merging.finished import check_base
from upcycle.conversion.merging.own_texts import own_texts
from upcycle.conversion.plan import Plan
from upcycle.conversion.planning import make_plan
from upcycle.conversion.units import GATE, SEEN
from upcycle.conversion.writing import take_up, write_small_files, write_weights
from upcycle.core.errors import CheckFailed, UpcycleError
from upcycle.core.machine import peak_memory, torch_threads
from upcycle.core.progress import Progress
from upcycle.core.types import DenseFFN
from upcycle.core.versions import versions
from upcycle.models.assemble import dense_ffn
from upcycle.models.calibration import Calibration, calibration, text_fingerprint
from upcycle.models.record.check import Report
from upcycle.models.record.conversion import DenseLayers, FitPart
from upcycle.models.record.file import RECORD, Identity, record_text
from upcycle.models.workspace import Workspace, begun_run, check_unfinished, recorded_run

DENSE_LAYERS = "layers to keep dense"


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
        write_small_files(plan, workspace.result)
        write_weights(plan, workspace, fit_BL, progress)
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
    geometry, fits = plan.design.geometry, [FitPart(**u["fit"]) for u in units if "fit" in u]
    learned = said(fits, geometry.top_k)
    if plan.design.fits and not fits:
        why = idle(plan.fit_tokens, geometry.top_k, geometry.num_experts)
        learned = f"Nothing was learned: {why or 'the experts put out nothing'}."
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
        yield layer, take_up(plan, workspace, f"layer {layer}", ffn).all_on()


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
