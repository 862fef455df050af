"""How upcycle made the model."""

import re

import yaml

from upcycle.console import size
from upcycle.page.section import Facts, Section
from upcycle.page.words import digits, duration, listing, percent, public_name

LOSSY_METHODS = {"split": "split", "prune": "pruned copies"}


def conversion(made: Facts | None) -> Section:
    """What upcycle.json says of the conversion."""
    if not made:
        return None
    recipe, tokens = made["plan"]["recipe"], made["plan"]["calibration_tokens"]
    calibration = _texts(recipe["calibration"])
    facts = {
        "Source": _revision(made["source"]),
        "Recipe": recipe["name"],
        **_methods(recipe),
        "Experts": _geometry(made["plan"]),
        "Layers": _layers(made["plan"]),
        "Calibration": f"{tokens:,} tokens of {calibration}" if tokens else "",
        "Training": "; ".join(map(_trained, made["training"])),
        "Exactness": _exactness(made["plan"], made["check"]),
        "Notes": "; ".join(made["plan"]["warnings"]),
        "Runtimes": "; ".join(f"{name}: {why}" for name, why in made["plan"]["runtimes"].items()),
        "Time": ", ".join(f"{stage} {duration(s)}" for stage, s in made["seconds"].items()),
        "Peak memory": size(made["peak_memory"]),
        "Versions": ", ".join(f"{name} {number}" for name, number in made["versions"].items()),
    }
    paper = re.fullmatch(r"arXiv:(\d{4}\.\d{4,5})", recipe["paper"])
    return {
        "facts": [(fact, value) for fact, value in facts.items() if value],
        "paper": paper and paper[1],
        "settings": yaml.safe_dump(
            recipe | {"calibration": calibration}, sort_keys=False, allow_unicode=True
        ),
    }


def _revision(source: Facts) -> str:
    revision = f" at {source['revision']}" if source["revision"] else ""
    return f"{public_name(source['name'])}{revision}"


def _methods(recipe: Facts) -> dict[str, str]:
    """The methods that the recipe's own method uses."""

    def name(key: str) -> str:
        choice = recipe.get(key) or {}
        return str(choice.get("name", ""))

    method, order = name("method"), ", each layer fitted on the converted layers before it"
    if method not in LOSSY_METHODS:
        return {"Method": method, "Router": name("router")}
    return {
        "Method": LOSSY_METHODS[method] + (order if recipe.get("sequential") else ""),
        "Split by": name("split") if method == "split" else "",
        "Shared by": name("shared_by") if recipe.get("shared") else "",
        "Router": name("router"),
        "Compensation": name("compensate").replace("_", " "),
    }


def _geometry(plan: Facts) -> str:
    shared = f", and {plan['shared_size']} always on" if plan["shared_size"] else ""
    return (
        f"{plan['top_k']} of {plan['experts']} per token, "
        f"{plan['expert_size']} neurons each{shared}; {percent(plan['active_ffn_ratio'])} of the "
        "dense model's FFN active, all layers together"
    )


def _layers(plan: Facts) -> str:
    kept = plan["dense_layers"]
    converted = f"{plan['layers'] - len(kept)} of {plan['layers']} converted"
    return f"{converted}; {listing(kept)} kept dense" if kept else converted


def _texts(label: str) -> str:
    """The parts of a text that is joined by +."""
    return "+".join(map(public_name, label.split("+")))


def _trained(run: Facts) -> str:
    return (
        f"preset {run['settings']['name']}: {run['step']:,} steps on {run['tokens']:,} tokens of "
        f"{_texts(run['settings']['data'])} in {duration(run['seconds'])}"
    )


def _exactness(plan: Facts, check: Facts | None) -> str:
    if not check or check["exact_error"] is None:
        return ""
    beside = "with all experts on, " if plan["recipe"]["method"]["name"] in LOSSY_METHODS else ""
    return f"{beside}logits differ by {digits(check['exact_error'], 2)} σ from the dense model's"
