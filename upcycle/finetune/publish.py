"""What a training run leaves: the checkpoint, checked by reading it again, and its history."""

import json
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from upcycle.core.errors import CheckFailed
from upcycle.core.paths import disk_errors, local_path, public_name, way_from
from upcycle.evaluation.comparing import next_token_logits
from upcycle.evaluation.result import TOLERANCE, load_result, relative_error
from upcycle.finetune.activations import name_activation
from upcycle.finetune.job import Job
from upcycle.finetune.settings import Training
from upcycle.finetune.state import whole_model
from upcycle.finetune.step import Progress, Row, Setup
from upcycle.finetune.trainable import Groups
from upcycle.models.blocks import SELECTION_BIAS
from upcycle.models.companions import copy_companions
from upcycle.models.frontmatter import read_card, split_card, with_results
from upcycle.models.loading import load_model
from upcycle.models.record import (
    DOMAINS,
    RECORD,
    Alarm,
    Made,
    Record,
    TrainingResult,
    TrainingRun,
    TrainingSettings,
    Used,
    Zeros,
    record_text,
)
from upcycle.models.shards import INDEX, SINGLE, read_headers, reading
from upcycle.models.text import public_texts
from upcycle.models.train_log import TRAIN_LOG, log_text
from upcycle.models.workspace import begun_run, result_folder

CHECK_TOKENS = 256
TRAINED, PARTS = "model-text.safetensors", "model-parts.safetensors"
"""Files of a model of several parts: of what was trained, if that is one, and of the rest."""


@dataclass(frozen=True)
class Finetuning:
    """A finished training run."""

    model: str
    out: Path
    settings: Training
    groups: Groups
    used: tuple[Used, ...]
    log: list[Row]
    result_step: int
    """Whose state the result is."""
    tokens: int
    seconds: float
    processes: int
    zeros: Zeros | None = None
    reload_error: float | None = None
    """Root mean square difference of the written checkpoint's logits from the trained model's,
    over their standard deviation."""

    @property
    def before(self) -> dict[str, float]:
        return self._validation(0)

    @property
    def after(self) -> dict[str, float]:
        return self._validation(self.result_step)

    @property
    def texts(self) -> dict[str, tuple[float, float]]:
        """Perplexity of the held-out part of each text, before and after."""
        before, after = (self._validated(step)["texts"] for step in (0, self.result_step))
        return {name: (perplexity, after[name]) for name, perplexity in before.items()}

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        return tuple(Alarm(**alarm) for row in self.log for alarm in row.get("alarms", ()))

    @property
    def last(self) -> Row:
        """The line of the last step."""
        return [row for row in self.log if "validation" not in row][-1]

    def _validation(self, step: int) -> dict[str, float]:
        measured: dict[str, float] = self._validated(step)["validation"]
        return measured

    def _validated(self, step: int) -> Row:
        return [row for row in self.log if "validation" in row and row["step"] == step][-1]


def finetuning_summary(done: Finetuning) -> TrainingResult:
    """What is to be known of a run, without its log, here: with the places on this machine."""
    return TrainingResult(
        model=done.model,
        out=str(done.out),
        settings=TrainingSettings.model_validate(done.settings.settings()),
        groups=done.groups,
        used=done.used,
        before=done.before,
        after=done.after,
        step=done.result_step,
        steps=done.settings.total_steps,
        tokens=done.tokens,
        seconds=round(done.seconds, 3),
        processes=done.processes,
        texts=done.texts,
        zeros=done.zeros,
        alarms=done.alarms,
        reload_error=done.reload_error,
    )


def publish(setup: Setup, progress: Progress, groups: Groups, job: Job) -> Finetuning:
    """Write the result into the workspace of the job's folder. Every process must call it.

    Raises:
        CheckFailed: what was written is not what was trained.
    """
    settings, folder = setup.settings, job.folder
    plain = setup.plain.eval()
    window_L = setup.validation.tokens_BL[0, :CHECK_TOKENS]
    expected_LV = next_token_logits(plain, window_L).cpu()
    tensors = whole_model(plain)
    done = Finetuning(
        model=job.label,
        out=job.out,
        settings=settings,
        groups=groups,
        used=setup.train.used,
        log=progress.log,
        result_step=progress.best_step if settings.keep_best else progress.step,
        tokens=progress.step * settings.step_tokens,
        seconds=progress.seconds,
        processes=setup.accelerator.num_processes,
        zeros=_zeros(setup, plain),
    )
    if not setup.accelerator.is_main_process:
        return done
    if settings.train == "experts" and (folder / DOMAINS).is_file():
        # It makes the rows that there are no longer, once routers have trained.
        shutil.copyfile(folder / DOMAINS, result_folder(job.out) / DOMAINS)
    place = result_folder(job.out)
    stored = next(iter(read_headers(folder).values())).dtype
    if settings.lora:
        _write_adapter(plain, tensors, job, place)
        written = _with_adapter(folder, place)
        # The rest, perhaps in another dtype while it trained, is the model's own.
        _check_tensors(written, {name: t for name, t in tensors.items() if ".lora_" in name})
        if settings.merge:
            for path in place.glob("adapter_*"):
                path.unlink()
            written = _write_model(written.merge_and_unload(), None, stored, folder, place)
    else:
        written = _write_model(plain, tensors, stored, folder, place, settings.activation)
    error = relative_error(next_token_logits(written, window_L), expected_LV)
    # Below float32, rounding may send a token to other experts; its tensors have been compared.
    exact = setup.accelerator.mixed_precision == "no" and plain.dtype == stored == torch.float32
    if exact and not error <= TOLERANCE:
        raise CheckFailed(
            f"the written checkpoint is not the model that was trained: its logits differ by "
            f"{error:.2g} of their spread (at most {TOLERANCE:g} is rounding)"
        )
    done = replace(done, reload_error=error)
    _write_history(done, job, place)
    return done


def _zeros(setup: Setup, plain: Any) -> Zeros | None:
    tap = setup.activations
    if tap is None:
        return None
    return Zeros(
        original=tap.zeros_of_original,
        before=tap.zeros_before,
        after=tap.zeros(plain, setup.validation),
    )


def _write_model(
    model: Any,
    tensors: dict[str, Tensor] | None,
    stored: torch.dtype,
    folder: Path,
    place: Path,
    activation: str | None = None,
) -> Any:
    """Write the same files as the original's, with the trained weights (by default, the model's
    own) in the original's dtypes and, if one is given, another activation in config.json; returns
    what they hold, read again."""
    tensors = dict(model.state_dict()) if tensors is None else tensors
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    headers = read_headers(folder)
    kept = {
        name: tensor if name.endswith(SELECTION_BIAS) else tensor.to(stored)
        for name, tensor in tensors.items()
    }
    with disk_errors():
        model.save_pretrained(place, state_dict=kept)
        _keep_parts(folder, place)
    shutil.copyfile(folder / "config.json", place / "config.json")
    if activation is not None:
        name_activation(place / "config.json", model.config, activation)
    copy_companions(folder, place)
    written = {name: (info.shape, info.dtype) for name, info in read_headers(place).items()}
    expected = {name: (info.shape, info.dtype) for name, info in headers.items()}
    if written != expected:
        name = sorted(dict(written.items() ^ expected.items()))[0]
        raise CheckFailed(
            f"the written checkpoint has another layout: {name} is {written.get(name)}, "
            f"not {expected.get(name)}"
        )
    again = load_result(place, torch.float32, torch.device("cpu"))
    _check_tensors(again, kept)
    return again


def _keep_parts(folder: Path, place: Path) -> None:
    """Add what transformers did not load, such as a vision tower beside the text model, as it is in
    the original."""
    before, written = read_headers(folder), read_headers(place)
    missing = sorted(before.keys() - written.keys())
    if not missing:
        return
    tensors = {}
    for name in missing:
        with reading(folder / before[name].file) as shard:
            tensors[name] = shard.get_tensor(name)
    if (place / SINGLE).is_file():
        (place / SINGLE).rename(place / TRAINED)
    save_file(tensors, place / PARTS, metadata={"format": "pt"})
    files = {name: info.file.replace(SINGLE, TRAINED) for name, info in written.items()}
    size = sum(info.nbytes for info in (before | written).values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": files | dict.fromkeys(missing, PARTS),
    }
    (place / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check_tensors(written: Any, expected: dict[str, Tensor]) -> None:
    """Every value that was written is the one that was trained."""
    found = written.state_dict()
    for name, tensor in expected.items():
        if name not in found or not torch.equal(found[name].float(), tensor.float()):
            raise CheckFailed(f"the written checkpoint holds another {name} than was trained")


def _write_adapter(model: Any, tensors: dict[str, Tensor], job: Job, place: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = base_from(job)
    with disk_errors():
        model.save_pretrained(place, state_dict=tensors, save_embedding_layers=False)
    copy_companions(job.folder, place)
    (place / "README.md").unlink(missing_ok=True)  # peft's own card


def base_from(job: Job) -> str:
    """How an adapter at the job's place names the model that it changes: a hub id, or the way from
    its folder; where there is none that may be published, it is to lie beside it."""
    if not local_path(job.label).exists():
        return job.label
    way = way_from(job.out, job.folder)
    return way if way.startswith("..") else f"../{way}"


def _with_adapter(folder: Path, place: Path) -> Any:
    """The written adapter on the model that it changes."""
    from peft import PeftModel

    base = load_model(folder, torch.float32, torch.device("cpu"))
    return PeftModel.from_pretrained(base, place, use_safetensors=True).eval()


def _write_history(done: Finetuning, job: Job, place: Path) -> None:
    """The record, the log and the card, with this run added to what they said."""
    (place / RECORD).write_text(record_text(_record_after(done, job)))
    (place / TRAIN_LOG).write_text("".join(map(log_text, done.log)))
    if done.settings.lora and not done.settings.merge:
        text = _adapter_card(done, job)
    else:
        text = _card_before(done, job)
    section = (
        _environment().from_string(CARD).render(done=done, data=public_texts(done.settings.data))
    )
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


CARD = """

## Training

{% set settings = done.settings %}
Trained by upcycle with preset `{{ settings.name }}` on {{ "{:,}".format(done.tokens) }} tokens of
`{{ data }}`: {{ done.tokens // settings.step_tokens }} steps of {{ settings.batch_size }}
sequences of {{ settings.seq_len }}, learning rate {{ settings.lr }}\
{% if settings.lora %}, low-rank changes of rank {{ settings.lora }}{% endif %}; the state after
step {{ done.result_step }} was kept.\
{% if done.tokens // settings.step_tokens < settings.total_steps %} It was to \
take {{ settings.total_steps }}, but a loss or a gradient came to be no number.{% endif %}\
{% if not settings.lora or settings.merge %} What this card says above of weights and of quality \
was so before.{% endif %}


| on held-out text | before | after |
|---|---|---|
| perplexity | {{ "%.3f" | format(done.before.perplexity) }} \
| {{ "%.3f" | format(done.after.perplexity) }} |
{% if "kl" in done.after %}
| perplexity over the dense model's | {{ "%.3f" | format(done.before.perplexity_ratio) }} \
| {{ "%.3f" | format(done.after.perplexity_ratio) }} |
| KL to the dense model | {{ "%.4f" | format(done.before.kl) }} \
| {{ "%.4f" | format(done.after.kl) }} nats |
{% endif %}
{% if done.texts | length > 1 %}
{% for name, (before, after) in done.texts.items() %}
| perplexity of {{ name }} | {{ "%.3f" | format(before) }} | {{ "%.3f" | format(after) }} |
{% endfor %}
{% endif %}
{% if done.zeros %}

The activation of its FFNs is {{ settings.activation }}: of what it puts out for the held-out text
{{ "%.2f" | format(100 * done.zeros.after) }} % is exactly zero,
{{ "%.2f" | format(100 * done.zeros.before) }} % before training and
{{ "%.2f" | format(100 * done.zeros.original) }} % with the activation that the model came with.
{% endif %}
{% if done.alarms %}

{% for alarm in done.alarms %}
- Alarm after step {{ alarm.step }}: {{ alarm.says }}.
{% endfor %}
{% endif %}
"""
