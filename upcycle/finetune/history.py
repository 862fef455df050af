"""What a result says of its training: its record, its log and its card."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import yaml

from upcycle.core.paths import public_name, way_from
from upcycle.finetune.finished import Finetuning, finetuning_summary
from upcycle.finetune.job import Job
from upcycle.finetune.writing import base_from
from upcycle.models.frontmatter import read_card, split_card, with_results
from upcycle.models.record.file import RECORD, Made, Record, record_text
from upcycle.models.record.training import TrainingResult, TrainingRun
from upcycle.models.text import public_texts
from upcycle.models.train_log import TRAIN_LOG, log_text
from upcycle.models.workspace import begun_run


def write_history(done: Finetuning, job: Job, place: Path) -> None:
    """The record, the log and the card, with this run added to what they said."""
    (place / RECORD).write_text(record_text(_record_after(done, job)))
    (place / TRAIN_LOG).write_text("".join(map(log_text, done.log)))
    if done.settings.lora and not done.settings.merge:
        text = _adapter_card(done, job)
    else:
        text = _card_before(done, job)
    template = _environment().get_template("training.md.jinja")
    section = template.render(done=done, data=public_texts(done.settings.data))
    (place / "README.md").write_text(text + section, encoding="utf-8")


def _record_after(done: Finetuning, job: Job) -> Record:
    """The model's record with this run. What the conversion measured is no longer true of these
    weights, so it goes with the run."""
    before = job.record
    known = {"upcycle": version("upcycle"), "check_before": before.check}
    run = TrainingRun.model_validate(_public_summary(done).plain() | known)
    changed: dict[str, Any] = {"check": None, "training": [*before.training, run]}
    if isinstance(before, Made) and (dense := before.source.place(job.folder)) is not None:
        name = way_from(job.out, dense)
        changed["source"] = before.source.model_copy(update={"name": name})
    return before.model_copy(update=changed | {"run": begun_run(done.out)})


def _public_summary(done: Finetuning) -> TrainingResult:
    """What of a run may be published: of paths only the names."""
    summary, teacher = finetuning_summary(done), done.settings.teacher
    public = {
        "data": public_texts(done.settings.data),
        "teacher": None if teacher is None else public_name(teacher),
    }
    settings = summary.settings.model_copy(update=public)
    names = {"model": public_name(done.model), "out": done.out.name}
    return summary.model_copy(update=names | {"settings": settings})


def _card_before(done: Finetuning, job: Job) -> str:
    """The model's card, if it has one, with the result's numbers in its front matter."""
    card = job.folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    front, text = split_card(text)
    if not front:
        return text
    front.pop("model-index", None)
    return f"---\n{yaml.safe_dump(_with_after(front, done), sort_keys=False)}---\n{text}"


def _with_after(front: dict[str, Any], done: Finetuning) -> dict[str, Any]:
    """The front matter with what was measured after training."""
    data = public_texts(done.settings.data)
    names = {"perplexity": "perplexity", "perplexity_ratio": "perplexity over the dense model's"}
    metrics = {called: done.after[name] for name, called in names.items() if name in done.after}
    return with_results(front, done.out.name, [(data, f"{data}, held out", metrics)])


def _adapter_card(done: Finetuning, job: Job) -> str:
    """README.md of low-rank changes, with front matter for the hub."""
    base = base_from(job)
    front = read_card(job.folder) | {
        "base_model": public_name(job.label),
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "moe", "mixture-of-experts", "upcycle"],
    }
    return (
        _environment()
        .get_template("adapter.md.jinja")
        .render(
            front=yaml.safe_dump(_with_after(front, done), sort_keys=False),
            base=base,
            local=base != job.label,
            name=public_name(job.label),
            settings=done.settings,
            version=version("upcycle"),
        )
    )


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("upcycle", "finetune"),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        undefined=jinja2.StrictUndefined,
    )
