"""What a conversion leaves to read: upcycle.json for machines, a model card for people."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import yaml

from upcycle.conversion.memory import peak_bytes
from upcycle.conversion.merging.addition import merge_part
from upcycle.conversion.merging.finished import Finished
from upcycle.conversion.merging.sources import Sources
from upcycle.conversion.plan import Plan
from upcycle.core.paths import local_path, public_name, way_from
from upcycle.core.versions import versions
from upcycle.evaluation.verdict import verdict
from upcycle.models.frontmatter import read_card, with_results
from upcycle.models.record.check import CheckReport, HiddenResult, KindResult, Report
from upcycle.models.record.conversion import (
    ConversionResult,
    DenseLayers,
    LayerPart,
    PlanPart,
    RecipePart,
)
from upcycle.models.record.file import TEXTUAL, Identity, Made, Source
from upcycle.models.record.merging import AddedPart, ExpertPart, Findings, MergePart
from upcycle.models.source import DenseSource
from upcycle.models.targets import TARGETS
from upcycle.models.text import kind_name, public_texts


@dataclass(frozen=True)
class Conversion:
    """A finished conversion."""

    plan: Plan
    run: Identity
    out: Path
    check: Report | None
    seconds: Mapping[str, float]
    peak_bytes: int
    dense_layers: DenseLayers | None = None
    """How the layers to keep dense were found, where they were measured."""
    findings: Findings | None = None
    """Of a merge."""
    learned: str = ""
    """What layers have learned, in words."""


def plan_summary(plan: Plan, *, measured: bool = False) -> PlanPart:
    """What is to be known of a plan; `measured` as `peak_bytes` takes it."""
    arch, geometry = plan.source.arch, plan.design.geometry
    return PlanPart(
        source=plan.source.label,
        family=arch.family,
        target=plan.target,
        targets={name: why or "ok" for name, why in plan.targets.items()},
        runtimes={name: why or "ok" for name, why in plan.runtimes.items()},
        method=plan.recipe.method.name,
        layers=arch.num_layers,
        dense_layers=list(plan.spec.dense_layers),
        hidden_size=arch.hidden_size,
        intermediate_size=arch.intermediate_size,
        experts=geometry.num_experts,
        top_k=geometry.top_k,
        granularity=geometry.granularity,
        expert_size=geometry.expert_size,
        shared_size=geometry.shared_size,
        active_ffn_ratio=plan.active_ffn_ratio,
        params_dense=plan.params_dense,
        params_total=plan.params_total,
        params_active=plan.params_active,
        bytes=plan.bytes,
        dtype=str(plan.design.dtype).removeprefix("torch."),
        device=str(plan.device),
        peak_memory_estimate=peak_bytes(plan, measured=measured),
        check_memory_estimate=plan.check_bytes(),
        gradient_bytes=plan.gradient_bytes,
        calibration_tokens=plan.fit_tokens,
        check_tokens=plan.held_tokens,
        feedback=plan.design.feedback,
        warnings=list(plan.warnings),
        recipe=RecipePart.model_validate(plan.recipe.settings()),
        **({} if plan.sources is None else {"merge": _merge_part(plan.sources)}),
    )


def _merge_part(sources: Sources, *, fingerprints: bool = False) -> MergePart:
    """The models, by names that may be published.

    Args:
        fingerprints: of what was read, which takes reading all of it.
    """
    merge, count = sources.merge, len(sources.merge.experts)
    found = sources.fingerprints() if fingerprints else [None] * len(merge.all)
    parts = [
        ExpertPart(
            model=expert.model.public,
            prompts=list(expert.prompts),
            negatives=list(expert.negatives),
            text=expert.text and public_texts(expert.text),
            noise_scale=expert.noise_scale,
            residual_scale=expert.residual_scale,
            fingerprint=fingerprint,
        )
        for expert, fingerprint in zip(merge.all, found, strict=True)
    ]
    return MergePart(experts=parts[:count], shared=parts[count] if merge.shared else None)


def conversion_summary(conversion: Conversion) -> ConversionResult:
    """What is to be known of a conversion, here: with the places on this machine."""
    return ConversionResult(
        out=str(conversion.out),
        plan=plan_summary(conversion.plan, measured=conversion.dense_layers is not None),
        check=conversion.check,
        seconds={stage: round(s, 3) for stage, s in conversion.seconds.items()},
        peak_memory=conversion.peak_bytes,
        dense_layers=conversion.dense_layers,
        **_found(conversion),
    )


def _found(conversion: Conversion) -> dict[str, Any]:
    return {} if conversion.findings is None else {"findings": conversion.findings}


def conversion_record(conversion: Conversion, layers: Iterable[Mapping[str, Any]]) -> Made:
    """What is published of a conversion."""
    source, result = conversion.plan.source, conversion_summary(conversion)
    name = source.label
    if source.revision is None:
        name = way_from(conversion.out, local_path(source.label))
    calibration = public_texts(conversion.plan.recipe.calibration)
    recipe = result.plan.recipe.model_copy(update={"calibration": calibration})
    public: dict[str, Any] = {"source": public_name(source.label), "recipe": recipe}
    if conversion.plan.sources is not None:
        public["merge"] = _merge_part(conversion.plan.sources, fingerprints=True)
    made = Made(
        out=conversion.out.resolve().name,
        plan=result.plan.model_copy(update=public),
        check=conversion.check and _public_check(conversion.check),
        seconds=result.seconds,
        peak_memory=result.peak_memory,
        dense_layers=result.dense_layers,
        versions=versions(),
        source=Source(name=name, revision=source.revision, fingerprint=source.fingerprint()),
        run=conversion.run,
        layers=[LayerPart.model_validate(layer) for layer in layers],
        **_found(conversion),
    )
    finished = conversion.plan.finished
    return made if finished is None else _with_history(made, finished)


def _with_history(made: Made, finished: Finished) -> Made:
    """The record of a merge with an expert more: what is said of the others, and of what was done
    to them, is what the merge's own says."""
    before, new = finished.record, made.plan.merge
    router = made.plan.recipe.router
    if new is None or router is None:
        raise ValueError("the plan is of no merge")
    old = merge_part(before)
    merge = MergePart(experts=[*old.experts, new.experts[-1]], shared=old.shared)
    added = AddedPart(
        expert=finished.num_experts,
        router=router,
        after_training=len(before.training),
        upcycle=version("upcycle"),
        check_before=before.check,
        findings_before=before.findings,
    )
    recipe = made.plan.recipe.model_copy(update={"router": before.plan.recipe.router})
    plan = made.plan.model_copy(update={"merge": merge, "recipe": recipe})
    history = {"training": before.training, "added": [*before.added, added]}
    return made.model_copy(update={"plan": plan} | history)


def _public_check(check: Report) -> Report:
    changed: dict[str, Any] = {
        "kinds": [replace(kind, kind=public_name(kind.kind)) for kind in check.kinds],
        "left_out": list(map(public_name, check.left_out)),
    }
    return replace(check, **changed)


def papers(plan: Plan) -> list[str]:
    """The papers behind the methods that a plan uses, each once."""
    design = plan.design
    used = [*plan.way.used(design.methods, design.geometry).values()]
    if design.compensates:
        used.append(design.methods.compensate)
    listed = [plan.recipe.paper, *(bound.method.paper for bound in used)]
    return sorted({paper for paper in listed if paper.startswith("arXiv")})


def model_card(conversion: Conversion) -> str:
    """README.md of the output, with front matter for the hub."""
    plan, check = conversion.plan, conversion.check
    task = plan.source.arch.task
    front = read_card(plan.source.folder)
    on_hub = [source for source in _sources(plan) if source.revision is not None]
    if on_hub:
        front["base_model"] = list({_hub_name(source): None for source in on_hub})
    front |= {
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": ["moe", "mixture-of-experts", "upcycle", plan.target, plan.recipe.method.name],
    }
    if "base_model" in front:
        front["base_model_relation"] = "finetune" if plan.sources is None else "merge"
    kinds = check.kinds if check else []
    results = [(public_name(k.kind), kind_name(k.kind), _metrics(k)) for k in kinds]
    front = with_results(front, conversion.out.resolve().name, results, task)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("upcycle", "conversion"),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template("card.md.jinja").render(
        front=yaml.safe_dump(front, sort_keys=False),
        plan=plan,
        target=TARGETS[plan.target],
        name=public_name(plan.source.label),
        check=check,
        findings=conversion.findings,
        learned=conversion.learned,
        kind_name=kind_name,
        verdict=verdict(check.ratios) if isinstance(check, CheckReport) else None,
        fitted=_fitted(plan),
        papers=papers(plan),
        used=plan.way.used(plan.design.methods, plan.design.geometry),
        version=version("upcycle"),
    )
    return text if plan.finished is None else text + _history(plan, plan.finished)


HISTORY = re.compile(r"^## (Training|Expert \d+, added later)$", re.MULTILINE)


def _history(plan: Plan, finished: Finished) -> str:
    """What the merge's card says of what was done to it since it was made, and the expert more."""
    card = finished.folder / "README.md"
    before = card.read_text("utf-8") if card.is_file() else ""
    start = HISTORY.search(before)
    router = plan.recipe.router_name
    trained = " (trained further by now)" if finished.record.training else ""
    told = f"{before[start.start() :].rstrip()}\n" if start else ""
    return (
        f"\n{told}\n## Expert {finished.num_experts}, added later\n\n"
        f"Added by upcycle {version('upcycle')} to a merge of {finished.num_experts} "
        f"experts{trained}, whose tensors stay as they\nwere; its rows of the routers are made by "
        f"`{router}`.\n"
    )


def _fitted(plan: Plan) -> str:
    """On what text the model was fitted, as the tail of a sentence; empty if on none."""
    merge, gate = plan.design.merge, plan.design.methods.gate
    if merge is not None and merge.texts and gate is not None and gate.name in TEXTUAL:
        return f"; its routers were fitted on `{public_texts('+'.join(merge.texts))}`"
    if plan.fit_tokens:
        return f"; calibrated on `{public_texts(plan.recipe.calibration)}`"
    return ""


def _sources(plan: Plan) -> list[DenseSource]:
    """The models that weights are from, the base first."""
    return [plan.source, *(plan.sources.models if plan.sources else ())]


def _hub_name(source: DenseSource) -> str:
    return source.label.partition("+")[0]


def _metrics(kind: KindResult | HiddenResult) -> dict[str, float]:
    if isinstance(kind, HiddenResult):
        return {"error of hidden states": kind.error, "cosine of hidden states": kind.cosine}
    return {"perplexity": kind.perplexity_moe, "perplexity over the dense model's": kind.ratio}
