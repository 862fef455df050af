"""The report page: facts about a model in, one self-contained HTML page out.

Each section is a function from facts to what the template shows, or to None where there is nothing
to show. Facts are what `upcycle.facts.gather` gives.
"""

import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

import jinja2
import yaml

from upcycle import charts
from upcycle.console import count, size

Facts = Mapping[str, Any]
Section = dict[str, Any] | None

LOSSY = 1.1
"""The perplexity ratio above which a model is to be trained before use, as on its card."""
ALIKE = 0.05
"""Experts whose cosine is below it are as good as orthogonal."""


def render(facts: Facts) -> str:
    """The page. The template escapes everything that comes from the facts."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("upcycle"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["digits"] = digits
    evaluation, made = facts["evaluation"], facts["made"]
    return environment.get_template("report.html.jinja").render(
        name=public_name(facts["model"]),
        kind=kind(facts),
        verdict=verdict(facts),
        shape=shape(facts),
        tiles=tiles(facts),
        texts=texts(evaluation, made),
        damage=damage(made),
        similarity=similarity(evaluation["similarity"]),
        load=load(evaluation["routing"]),
        pairs=pairs(evaluation["routing"]),
        training=training(facts["log"]),
        tables=[sheet for sheet in (speed(evaluation), tasks(evaluation)) if sheet],
        made=origin(made),
        version=version("upcycle"),
    )


def public_name(label: str) -> str:
    """A hub id as it is; of a path only the last part, as the page may be published."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", label)
    return label if is_id else PurePath(label).name or label


# --- numbers as text -------------------------------------------------------------------------


def digits(value: float, number: int = 3) -> str:
    """So many significant digits, with no exponent where that is readable."""
    if not math.isfinite(value):
        return str(value)
    rounded = f"{value:.{number - 1}e}"
    exponent = int(rounded.partition("e")[2])
    if not -4 <= exponent < 6:
        return rounded
    return f"{value:,.{max(number - 1 - exponent, 0) if value else 0}f}"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def listing(numbers: Sequence[int]) -> str:
    """`layers 0, 1 and 29`."""
    *first, last = map(str, numbers)
    return f"layers {', '.join(first)} and {last}" if first else f"layer {last}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{digits(seconds, 2)} s"


# --- header ----------------------------------------------------------------------------------


def kind(facts: Facts) -> str:
    """The line above the name: what the model is and where it comes from."""
    inspection, made = facts["inspection"], facts["made"]
    words = "dense model" if inspection["kind"] == "dense" else "Mixture-of-Experts"
    source = f", made from {public_name(made['source']['name'])}" if made else ""
    return f"{inspection['architecture']} {words}{source}"


def verdict(facts: Facts) -> str:
    """The page in one sentence: quality, and what a token costs."""
    whole, params = overall(facts["evaluation"]), facts["evaluation"]["params"]
    ratio = whole["ratio"]
    if ratio is None:
        quality = f"Perplexity is {digits(whole['perplexity'])}"
    else:
        cost = ", so train it further before use" if ratio > LOSSY else ""
        quality = f"Perplexity is {digits(ratio, 4)} × the dense model's{cost}"
    if facts["inspection"]["kind"] == "dense":
        return f"{quality}; every parameter works on every token."
    share = percent(params["active"] / params["total"])
    return f"{quality}; {share} of its {count(params['total'])} parameters work on each token."


def overall(evaluation: Facts) -> dict[str, Any]:
    """The numbers of all texts together: each has as many tokens, so perplexities have their
    geometric mean, and the rest its mean."""
    rows = evaluation["texts"]

    def mean(key: str) -> float | None:
        values = [row[key] for row in rows]
        return None if None in values else sum(values) / len(values)

    def geometric(key: str) -> float | None:
        values = [row[key] for row in rows]
        return None if None in values else math.exp(sum(map(math.log, values)) / len(values))

    return {
        "perplexity": geometric("perplexity"),
        "against": geometric("perplexity_against"),
        "ratio": geometric("perplexity_ratio"),
        "kl": mean("kl"),
        "agreement": mean("top1_agreement"),
    }


def shape(facts: Facts) -> Section:
    """One token's experts: always on, chosen, idle."""
    inspection, plan = facts["inspection"], (facts["made"] or {}).get("plan", {})
    if inspection["kind"] == "dense":
        return None
    shared, top_k, routed = (
        plan.get("shared_experts", 0),
        inspection["top_k"],
        inspection["experts"],
    )
    always = f"{shared} always on, " if shared else ""
    return {
        "shared": shared,
        "active": top_k,
        "idle": routed - top_k,
        "caption": f"A layer's experts for one token: {always}{top_k} of {routed} chosen by the "
        f"router; {inspection['expert_size']} neurons each.",
    }


def tiles(facts: Facts) -> list[dict[str, Any]]:
    """The key numbers; those that were not measured are left out."""
    evaluation = facts["evaluation"]
    found = [*_quality_tiles(overall(evaluation)), *_cost_tiles(evaluation)]
    if evaluation["routing"]:
        dead = sum(layer["dead"] for layer in evaluation["routing"])
        experts = sum(len(layer["load"]) for layer in evaluation["routing"])
        if facts["made"]:
            ffn = facts["made"]["plan"]["active_ffn_ratio"]
            found.append(_tile("Active FFN neurons", percent(ffn), "of the dense model's", ffn))
        found.append(_tile("Dead experts", str(dead), f"of {experts:,} were never chosen"))
    return found


def _tile(label: str, value: str, note: str, part: float | None = None) -> dict[str, Any]:
    return {"label": label, "value": value, "note": note, "part": part}


def _quality_tiles(whole: Facts) -> list[dict[str, Any]]:
    perplexity = digits(whole["perplexity"], 4)
    if whole["ratio"] is None:
        return [_tile("Perplexity", perplexity, "no dense model to compare with")]
    ratio, same = whole["ratio"], whole["agreement"]
    return [
        _tile("Perplexity", f"{digits(whole['against'])} → {digits(whole['perplexity'])}",
              "dense → this model"),
        _tile("Perplexity ratio", f"× {digits(ratio, 4)}", f"{100 * (ratio - 1):+.1f} %"),
        _tile("KL to the dense model", digits(whole["kl"]), "nats per token"),
        _tile("Same next token", percent(same), "as the dense model predicts", same),
    ]  # fmt: skip


def _cost_tiles(evaluation: Facts) -> list[dict[str, Any]]:
    params, flops = evaluation["params"], evaluation["flops"]
    dense, share = flops["active_against"], params["active"] / params["total"]
    moe = bool(evaluation["routing"])
    active = f"{percent(share)} of {count(params['total'])}" if moe else "all are active"
    part = flops["active"] / dense if dense else None
    return [
        _tile("Active parameters", count(params["active"]), active, share if moe else None),
        _tile(
            "FLOPs per token",
            count(flops["active"]),
            f"{percent(part)} of the dense model's" if part else "without attention scores",
            part,
        ),
    ]


# --- quality ---------------------------------------------------------------------------------


def texts(evaluation: Facts, made: Facts | None) -> Section:
    """Dense against MoE on each text, and on that which the conversion held back."""
    rows = [dict(row, name=public_name(row["text"])) for row in evaluation["texts"]]
    check = made and made["check"]
    if check:
        keys = ("perplexity_ratio", "kl", "top1_agreement")
        rows.append(
            {"name": "held back by the conversion", "perplexity": check["perplexity_moe"]}
            | {"perplexity_against": check["perplexity_dense"], **{k: check[k] for k in keys}}
        )
    values = [row[key] for row in rows for key in ("perplexity_against", "perplexity")]
    top = charts.top([value for value in values if value is not None])
    note = f"{evaluation['tokens']:,} tokens of each text, in windows of {evaluation['window']}."
    if check:
        note += f" The conversion's own check read {check['tokens']:,} tokens right after it."
    own = "MoE" if evaluation["routing"] else "this"
    return {"note": note, "rows": [_text_row(row, own, top) for row in rows]}


def _text_row(row: Facts, own: str, top: float) -> dict[str, Any]:
    bars = [
        {"label": label, "value": digits(value, 4), "part": charts.share(value, top)}
        | {"own": label == own}
        for label, value in (("dense", row["perplexity_against"]), (own, row["perplexity"]))
        if value is not None
    ]
    distance = ""
    if row["perplexity_ratio"] is not None:
        distance = (
            f"× {digits(row['perplexity_ratio'], 4)}, KL {digits(row['kl'])}, "
            f"same next token {percent(row['top1_agreement'])}"
        )
    return {"name": row["name"], "bars": bars, "distance": distance}


def damage(made: Facts | None) -> Section:
    """KL per layer if only that layer is cut down."""
    values = made and made["damage"]
    if not made or not values:
        return None
    kept = made["plan"]["dense_layers"]
    fate = f"{listing(kept)} stayed dense" if kept else "no layer stayed dense"
    return {
        "note": f"KL to the dense model, in nats; {fate}.",
        "kept": bool(kept),
        "chart": charts.columns(values, range(len(values)), kept),
    }


def similarity(layers: Sequence[Facts]) -> Section:
    """How alike a layer's experts are."""
    if not layers:
        return None
    values = [layer["cosine"] for layer in layers]
    if max(values) < ALIKE:
        meaning = "near 0: they hold different neurons"
    elif min(values) > 1 - ALIKE:
        meaning = "near 1: they are copies of each other"
    else:
        meaning = "0 for different neurons, 1 for copies"
    return {
        "note": f"Mean cosine of the weights of two experts; {meaning}.",
        "chart": charts.columns(values, [layer["layer"] for layer in layers], full=1.0),
    }


# --- routing ---------------------------------------------------------------------------------


def load(layers: Sequence[Facts]) -> Section:
    """A row per layer, its experts from the busiest to the idlest."""
    if not layers:
        return None
    loads = [ratio for layer in layers for ratio in layer["load"]]
    limit = charts.limit(loads)
    rows = [_load_row(layer, limit) for layer in layers]
    dead = sum(layer["dead"] for layer in layers)
    spread = f"from {digits(min(loads), 2)} to {digits(max(loads), 2)} × the fair share"
    entropies = [layer["entropy"] for layer in layers]
    ends = dict.fromkeys(f"{end(entropies):.2f}" for end in (min, max))
    evenness = f"the layers' relative entropy is {' to '.join(ends)}, where 1 is perfectly even"
    return {
        "note": f"How often each expert is chosen: {spread}; {evenness}. Point at a cell for its "
        "number.",
        "text": f"Load of the experts in {len(layers)} layers, {spread}; {dead} are dead.",
        "rows": rows,
        "experts": max(len(row["cells"]) for row in rows),
        "dead": dead,
        **_scale(limit),
    }


def _load_row(layer: Facts, limit: float) -> dict[str, Any]:
    cells = []
    for expert, ratio in sorted(enumerate(layer["load"]), key=lambda pair: -pair[1]):
        tone = charts.tone(ratio, limit)
        look = "x" if ratio == 0 else "d" if tone < 0 else "u"
        cells.append({"expert": expert, "value": digits(ratio), "tone": abs(tone), "look": look})
    return {"layer": layer["layer"], "cells": cells}


def _scale(limit: float) -> dict[str, str]:
    return {"low": f"÷ {limit:g} or less", "high": f"× {limit:g} or more"}


def pairs(layers: Sequence[Facts]) -> Section:
    """Per layer, which experts are chosen for the same tokens: an image of E x E."""
    relative = [relative_pairs(layer["load"], layer["co_selection"]) for layer in layers]
    shown = [(layer, matrix) for layer, matrix in zip(layers, relative, strict=True) if matrix]
    if not shown:
        return None
    limit = charts.limit(ratio for _, matrix in shown for row in matrix for ratio in row)
    maps = [_pair_map(layer["layer"], matrix, limit) for layer, matrix in shown]
    return {
        "note": "Each square is a layer, its experts along both sides, partners next to each "
        "other: blue where two are chosen for the same tokens more often than the layer's average "
        "pair, orange where less often.",
        "layers": maps,
        "first": max(maps, key=lambda found: found["contrast"]),
        **_scale(limit),
    }


def relative_pairs(load: Sequence[float], co_selection: charts.Matrix) -> list[list[float]] | None:
    """Co-selection over that of the layer's average pair; None where a token has one expert.
    1 where there is nothing to compare: on the diagonal, and with a dead expert.

    The average is weighted by how often independent choices would give the pair. It is below 1:
    a token's experts are different ones.
    """
    experts = range(len(load))
    apart = [(i, j) for i in experts for j in experts if i != j]
    weights = sum(load[i] * load[j] for i, j in apart)
    average = sum(co_selection[i][j] * load[i] * load[j] for i, j in apart)
    if average == 0:
        return None
    mean = average / weights
    known = [[i != j and load[i] * load[j] > 0 for j in experts] for i in experts]
    return [[co_selection[i][j] / mean if known[i][j] else 1.0 for j in experts] for i in experts]


def _pair_map(layer: int, ratios: charts.Matrix, limit: float) -> dict[str, Any]:
    order = charts.together(ratios)
    tones = [[charts.tone(ratios[i][j], limit) for j in order] for i in order]
    best = sorted(
        ((ratios[i][j], i, j) for i in range(len(ratios)) for j in range(i)), reverse=True
    )[:3]
    strongest = ", ".join(f"{j} and {i} ({digits(ratio)} ×)" for ratio, i, j in best)
    return {
        "layer": layer,
        "image": charts.image(tones),
        "contrast": sum(abs(tone) for row in tones for tone in row),
        "text": f"Layer {layer}: most often together, against its average pair, are experts "
        f"{strongest}.",
    }


# --- training, speed, tasks ------------------------------------------------------------------


CURVES = (
    ("Training loss", "loss", None),
    ("Validation perplexity", "perplexity", "validation"),
    ("KL to the dense model, in nats", "kl", "validation"),
    ("Busiest expert, × its fair share", "imbalance", None),
)
"""Title, name in a line of the log, and the group of the line that holds it."""


def training(log: Sequence[Facts]) -> Section:
    """The curves of `upcycle finetune`."""
    panels = []
    for title, name, group in CURVES:
        parts = [(line["step"], line.get(group, {}) if group else line) for line in log]
        chart = charts.curve([(step, part[name]) for step, part in parts if name in part])
        if chart is not None:
            ends = f"{digits(chart.first)} at first, {digits(chart.last)} at last"
            panels.append({"title": title, "chart": chart, "text": f"{title}: {ends}."})
    if not panels:
        return None
    rates = [line["tokens_per_second"] for line in log if "tokens_per_second" in line]
    rate = f", {digits(sum(rates) / len(rates))} tokens per second" if rates else ""
    return {"note": f"{log[-1]['step']:,} steps{rate}.", "panels": panels}


def speed(evaluation: Facts) -> Section:
    """Tokens per second, beside the dense model's if they were measured."""
    measured = evaluation["speed"]
    if not measured:
        return None
    rows = [
        (name, *_beside(measured[key], measured[f"{key}_against"]))
        for name, key in (("reading the prompt", "prefill"), ("writing", "decode"))
    ]
    threads = f"{measured['threads']} thread" + ("" if measured["threads"] == 1 else "s")
    note = (
        f"Batch size {measured['batch_size']}, {measured['dtype']}, on {threads}; experts computed "
        f"by {measured['experts_implementation']}."
    )
    return _sheet("speed", "Tokens per second: higher is better", note, rows)


def tasks(evaluation: Facts) -> Section:
    """Scores of lm-eval's tasks."""
    scores = evaluation["tasks"]
    if not scores:
        return None
    rows = [
        (f"{task}, {metric.removesuffix(',none')}", *_beside(*pair))
        for task, metrics in scores.items()
        for metric, pair in metrics.items()
    ]
    return _sheet("tasks", "Benchmarks", "Run by lm-eval.", rows)


def _beside(model: float | None, dense: float | None) -> list[str]:
    """The dense model's number, this model's, and their ratio."""
    ratio = None if model is None or not dense else model / dense
    return [
        *("–" if value is None else digits(value) for value in (dense, model)),
        "–" if ratio is None else f"× {digits(ratio)}",
    ]


def _sheet(name: str, title: str, note: str, rows: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    headings = ("dense", "this model", "ratio")
    return {"id": name, "title": title, "note": note, "headings": headings, "rows": rows}


# --- origin ----------------------------------------------------------------------------------


def origin(made: Facts | None) -> Section:
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

    found = {"Method": name("method"), "Router": name("router")}
    if name("method") != "split":
        return found
    order = ", each layer fitted on the converted layers before it"
    return {
        "Method": "split" + (order if recipe.get("sequential") else ""),
        "Split by": name("split"),
        "Shared by": name("shared_by") if recipe.get("shared_experts") else "",
        "Router": name("router"),
        "Compensation": name("compensate").replace("_", " "),
    }


def _geometry(plan: Facts) -> str:
    shared = f"{plan['shared_experts']} shared + " if plan["shared_experts"] else ""
    return (
        f"{shared}{plan['top_k']} of {plan['routed_experts']} routed, "
        f"{plan['expert_size']} neurons each; {percent(plan['active_ffn_ratio'])} of the dense "
        "model's FFN active, all layers together"
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
    beside = "with all experts on, " if plan["recipe"]["method"]["name"] == "split" else ""
    return f"{beside}logits differ by {digits(check['exact_error'], 2)} σ from the dense model's"
