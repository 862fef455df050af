"""How upcycle made the model."""

import re

import yaml

from upcycle.core.flags import as_flags
from upcycle.core.words import size
from upcycle.evaluation.page.section import Section
from upcycle.evaluation.page.words import digits, duration, listing, percent, public_name
from upcycle.models.record.check import Report
from upcycle.models.record.conversion import PlanPart
from upcycle.models.record.file import Made, Source
from upcycle.models.record.training import TrainingRun

LOSSY_METHODS = {"split": "split", "prune": "pruned copies"}


def conversion(made: Made | None) -> Section:
    """What upcycle.json says of the conversion."""
    if not made:
        return None
    plan, recipe, tokens = made.plan, made.plan.recipe, made.plan.calibration_tokens
    calibration = _texts(recipe.calibration)
    facts = {
        "Source": _revision(made.source),
        "Recipe": recipe.name,
        **_methods(plan),
        "Experts": _geometry(plan),
        "Layers": _layers(plan),
        "Calibration": f"{tokens:,} tokens of {calibration}" if tokens else "",
        "Training": "; ".join(map(_trained, made.training)),
        "Exactness": _exactness(plan, made.check),
        "Notes": as_flags("; ".join(plan.warnings)),
        "Runtimes": "; ".join(f"{name}: {why}" for name, why in plan.runtimes.items()),
        "Time": ", ".join(f"{stage} {duration(s)}" for stage, s in made.seconds.items()),
        "Peak memory": size(made.peak_memory),
        "Versions": ", ".join(f"{name} {number}" for name, number in made.versions.items()),
    }
    paper = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", recipe.paper)
    return {
        "facts": [(fact, value) for fact, value in facts.items() if value],
        "paper": paper and paper[1],
        "settings": yaml.safe_dump(
            recipe.model_dump() | {"calibration": calibration}, sort_keys=False, allow_unicode=True
        ),
    }


def _revision(source: Source) -> str:
    revision = f" at {source.revision}" if source.revision else ""
    return f"{public_name(source.name)}{revision}"


def _methods(plan: PlanPart) -> dict[str, str]:
    """The methods that the recipe's own method uses."""
    recipe = plan.recipe
    router = recipe.router.name if recipe.router else ""
    compensation = recipe.compensate.name.replace("_", " ") if recipe.compensate else ""
    method, order = recipe.method.name, ", each layer fitted on the converted layers before it"
    if method not in LOSSY_METHODS:
        return {"Method": method, "Router": router}
    return {
        "Method": LOSSY_METHODS[method] + (order if recipe.sequential else ""),
        "Split by": recipe.split.name if method == "split" else "",
        "Shared by": recipe.shared_by.name if method == "split" and plan.shared_size else "",
        "Router": router,
        "Fit": recipe.fit.name.replace("_", " ") if recipe.fit else "",
        "Compensation": compensation,
    }


def _geometry(plan: PlanPart) -> str:
    shared = f", and {plan.shared_size} always on" if plan.shared_size else ""
    return (
        f"{plan.top_k} of {plan.experts} per token, {plan.expert_size} neurons each{shared}; "
        f"{percent(plan.active_ffn_ratio)} of the dense model's FFN active, all layers together"
    )


def _layers(plan: PlanPart) -> str:
    kept = plan.dense_layers
    converted = f"{plan.layers - len(kept)} of {plan.layers} converted"
    return f"{converted}; {listing(kept)} kept dense" if kept else converted


def _texts(label: str) -> str:
    """The parts of a text that is joined by +."""
    return "+".join(map(public_name, label.split("+")))


def _trained(run: TrainingRun) -> str:
    return (
        f"preset {run.settings.name}: {run.tokens:,} tokens of {_texts(run.settings.data)} in "
        f"{duration(run.seconds)}, the state after step {run.step:,} of {run.steps:,} kept"
    )


def _exactness(plan: PlanPart, check: Report | None) -> str:
    if not check or check.exact_error is None:
        return ""
    beside = "with all experts on, " if plan.recipe.method.name in LOSSY_METHODS else ""
    return f"{beside}logits differ by {digits(check.exact_error, 2)} σ from the dense model's"
