"""The head of the page: the model in one line, in one sentence, and in its key numbers."""

import math
from typing import Any

from upcycle.core.words import count
from upcycle.evaluation.measured import Evaluation
from upcycle.evaluation.page.facts import Facts
from upcycle.evaluation.page.quality import Overall, overall
from upcycle.evaluation.page.section import Section
from upcycle.evaluation.page.words import digits, percent, public_name
from upcycle.evaluation.verdict import FINE
from upcycle.models.record.file import Made


def kind(facts: Facts) -> str:
    """The line above the name: what the model is and where it comes from."""
    words = "dense model" if facts.inspection.dense else "Mixture-of-Experts"
    source = f", made from {public_name(facts.made.source.name)}" if facts.made else ""
    return f"{facts.inspection.architecture} {words}{source}"


def verdict(evaluation: Evaluation) -> str:
    """The page in one sentence: quality, and what a token costs."""
    whole, params = overall(evaluation), evaluation.params
    ratio = whole.ratio
    if ratio is None:
        quality = f"Perplexity is {digits(whole.perplexity)}"
    else:
        cost = ", so train it further before use" if ratio > FINE else ""
        quality = f"Perplexity is {digits(ratio, 4)} × the dense model's{cost}"
    if not evaluation.routing:
        return f"{quality}; every parameter works on every token."
    share = percent(params.active / params.total)
    return f"{quality}; {share} of its {count(params.total)} parameters work on each token."


def shape(facts: Facts) -> Section:
    """One token's experts: always on, chosen, idle."""
    inspection = facts.inspection
    if inspection.dense:
        return None
    shared = facts.made.plan.shared_size if facts.made else 0
    top_k, routed = inspection.top_k, inspection.experts
    always = f"a shared one of {shared} neurons, " if shared else ""
    return {
        "shared": math.ceil(shared / inspection.expert_size),
        "active": top_k,
        "idle": routed - top_k,
        "caption": f"A layer's experts for one token: {always}{top_k} of {routed} chosen by the "
        f"router; {inspection.expert_size} neurons each.",
    }


def tiles(made: Made | None, evaluation: Evaluation) -> list[dict[str, Any]]:
    """The key numbers; those that were not measured are left out."""
    found = [*_quality_tiles(overall(evaluation)), *_cost_tiles(evaluation)]
    if evaluation.routing:
        dead = sum(layer.dead for layer in evaluation.routing)
        experts = sum(len(layer.load) for layer in evaluation.routing)
        if made:
            ffn = made.plan.active_ffn_ratio
            found.append(_tile("Active FFN neurons", percent(ffn), "of the dense model's", ffn))
        found.append(_tile("Dead experts", str(dead), f"of {experts:,} were never chosen"))
    return found


def _tile(label: str, value: str, note: str, part: float | None = None) -> dict[str, Any]:
    return {"label": label, "value": value, "note": note, "part": part}


def _quality_tiles(whole: Overall) -> list[dict[str, Any]]:
    against, ratio, kl, same = whole.against, whole.ratio, whole.kl, whole.agreement
    if against is None or ratio is None or kl is None or same is None:
        number = digits(whole.perplexity, 4)
        return [_tile("Perplexity", number, "no dense model to compare with")]
    return [
        _tile("Perplexity", f"{digits(against)} → {digits(whole.perplexity)}",
              "dense → this model"),
        _tile("Perplexity ratio", f"× {digits(ratio, 4)}", f"{100 * (ratio - 1):+.1f} %"),
        _tile("KL to the dense model", digits(kl), "nats per token"),
        _tile("Same next token", percent(same), "as the dense model predicts", same),
    ]  # fmt: skip


def _cost_tiles(evaluation: Evaluation) -> list[dict[str, Any]]:
    params, flops = evaluation.params, evaluation.flops
    dense, share = flops.active_against, params.active / params.total
    moe = bool(evaluation.routing)
    active = f"{percent(share)} of {count(params.total)}" if moe else "all are active"
    part = flops.active / dense if dense else None
    return [
        _tile("Active parameters", count(params.active), active, share if moe else None),
        _tile(
            "FLOPs per token",
            count(flops.active),
            f"{percent(part)} of the dense model's" if part else "without attention scores",
            part,
        ),
    ]
