"""The command to run next."""

import shlex
from pathlib import PurePath

from upcycle.evaluation.measured import Evaluation
from upcycle.evaluation.page.facts import Facts
from upcycle.evaluation.page.origin import LOSSY_METHODS
from upcycle.evaluation.page.quality import overall
from upcycle.evaluation.page.section import Section
from upcycle.evaluation.page.words import digits, public_name
from upcycle.evaluation.verdict import FINE
from upcycle.models.record.check import CheckReport
from upcycle.models.record.file import Made
from upcycle.models.text import texts

NO_TRAINING_TEXT = ("self", "none")
SEQ2SEQ = "AutoModelForSeq2SeqLM"
LOADING = """\
from transformers import {1}, AutoTokenizer

model = {1}.from_pretrained({0!r})
tokenizer = AutoTokenizer.from_pretrained({0!r})"""


def advice(facts: Facts, evaluation: Evaluation) -> Section:
    """What to do with an MoE: train it, find out how good it is, or use it."""
    if facts.inspection.dense:
        return None
    made, ratio = facts.made, _ratio(facts.made, evaluation)
    if made and made.plan.recipe.method.name not in LOSSY_METHODS and not made.training:
        preset, why = _first_preset(made)
        found = _training(facts, evaluation, preset, "trained")
    elif ratio is not None and ratio > FINE and not (made and made.plan.merge):
        found = _training(facts, evaluation, "heal", "healed")
        why = "It has lost quality, which it can learn again from text and from the dense model."
    elif ratio is None and made:
        source = shlex.quote(public_name(made.source.name))
        found = f"upcycle report {_shell(facts)} --against {source} -o report.html"
        why = "How good it is shows beside the dense model."
    else:
        found, why = _use(facts), _why_use(made, ratio)
    place = "" if public_name(facts.model) == facts.model else " In the folder that it lies in:"
    return {"note": why + place, "command": found}


def _first_preset(made: Made) -> tuple[str, str]:
    """What trains copies or a merge for the first time, and why."""
    if made.plan.merge is None:
        return "specialise", "Its experts are copies, which training lets come to differ."
    # With one expert per token routers get no gradient.
    preset = "routers" if made.plan.top_k > 1 else "btx"
    return preset, "Its experts are several models' FFNs, which training shows its routers."


def _ratio(made: Made | None, evaluation: Evaluation) -> float | None:
    """Perplexity over the dense model's, here or at the conversion, if that was the last word."""
    ratio = overall(evaluation).ratio
    if ratio is None and made and isinstance(made.check, CheckReport) and not made.training:
        return made.check.perplexity_ratio
    return ratio


def _training(facts: Facts, evaluation: Evaluation, preset: str, suffix: str) -> str:
    if facts.loader == SEQ2SEQ:  # which others train
        return _use(facts)
    out = shlex.quote(f"{PurePath(public_name(facts.model)).name}-{suffix}")
    # upcycle.json names the dense model; beside an MoE of other origin only the page does.
    teacher = ""
    if facts.made is None and evaluation.against:
        teacher = f" --teacher {shlex.quote(public_name(evaluation.against))}"
    data = shlex.quote(_data(facts.made))
    return f"upcycle finetune {_shell(facts)} --recipe {preset}{teacher} --data {data} -o {out}"


def _data(made: Made | None) -> str:
    """The text that the conversion looked at, as far as one can train on it."""
    named = texts("+".join(_read_by(made))) if made else []
    return (
        "+".join(public_name(text) for text in named if text not in NO_TRAINING_TEXT) or "builtin"
    )


def _read_by(made: Made) -> list[str]:
    """What the conversion looked at: a merge at its experts' texts, if they have any."""
    merge = made.plan.merge
    own = dict.fromkeys(expert.text for expert in merge.experts if expert.text) if merge else ()
    return [*own] or [made.plan.recipe.calibration]


def _use(facts: Facts) -> str:
    if facts.made and facts.made.plan.runtimes.get("vLLM") == "ok":
        return f"vllm serve {_shell(facts)}"
    return LOADING.format(public_name(facts.model), facts.loader)


def _why_use(made: Made | None, ratio: float | None) -> str:
    quality = "" if ratio is None else f"At {digits(ratio, 4)} × the dense model's perplexity, "
    runtimes = made.plan.runtimes if made else {}
    runs = [*(name for name, why in runtimes.items() if why == "ok"), "transformers 5"]
    *others, last = runs
    runners = f"{', '.join(others)} and {last}" if others else last
    return f"{quality}it is ready for {runners}." if quality else f"It is ready for {runners}."


def _shell(facts: Facts) -> str:
    return shlex.quote(public_name(facts.model))
