"""What a training run leaves: the checkpoint, checked by reading it again, and its history."""

import json
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import torch
from pydantic import TypeAdapter
from torch import Tensor

from upcycle.check import TOLERANCE, load_result, relative_error
from upcycle.errors import CheckFailed
from upcycle.evaluate import load_model, next_token_logits
from upcycle.paths import disk_errors
from upcycle.sink import Identity, begun_run, result_folder
from upcycle.source import copy_companions, read_headers
from upcycle.training.job import Job, Record
from upcycle.training.settings import Training
from upcycle.training.state import whole_model
from upcycle.training.step import Row, Run
from upcycle.training.trainable import Groups

LOG = "train_log.jsonl"
CHECK_TOKENS = 256


@dataclass(frozen=True)
class Finetuning:
    """A finished training run."""

    model: str
    out: Path
    settings: Training
    groups: Groups
    log: list[Row]
    result_step: int
    """Whose state the result is."""
    tokens: int
    seconds: float
    processes: int
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
    def last(self) -> Row:
        """The line of the last step."""
        return [row for row in self.log if "validation" not in row][-1]

    def _validation(self, step: int) -> dict[str, float]:
        rows = [row for row in self.log if "validation" in row and row["step"] == step]
        measured: dict[str, float] = rows[-1]["validation"]
        return measured


def finetuning_summary(done: Finetuning) -> dict[str, Any]:
    """A run as plain values, without its log."""
    return {
        "model": done.model,
        "out": str(done.out),
        "settings": done.settings.settings(),
        "groups": done.groups,
        "before": done.before,
        "after": done.after,
        "step": done.result_step,
        "steps": done.settings.total_steps,
        "tokens": done.tokens,
        "seconds": round(done.seconds, 3),
        "processes": done.processes,
        "reload_error": done.reload_error,
    }


def publish(run: Run, groups: Groups, job: Job) -> Finetuning:
    """Write the result into the workspace of the job's folder. Every process must call it.

    Raises:
        CheckFailed: what was written is not what was trained.
    """
    settings, folder = run.settings, job.folder
    plain = run.plain.eval()
    window_L = run.validation.tokens_BL[0, :CHECK_TOKENS]
    expected_LV = next_token_logits(plain, window_L).cpu()
    tensors = whole_model(plain)
    done = Finetuning(
        model=job.label,
        out=job.out,
        settings=settings,
        groups=groups,
        log=run.log,
        result_step=run.best_step if settings.keep_best else run.step,
        tokens=run.step * settings.step_tokens,
        seconds=run.seconds,
        processes=run.accelerator.num_processes,
    )
    if not run.accelerator.is_main_process:
        return done
    place = result_folder(job.out)
    stored = next(iter(read_headers(folder).values())).dtype
    if settings.lora:
        _write_adapter(plain, tensors, job.label, place)
        written = _with_adapter(folder, place)
        _check_tensors(written, tensors)
        if settings.merge:
            for path in place.glob("adapter_*"):
                path.unlink()
            written = _write_model(written.merge_and_unload(), None, stored, folder, place)
    else:
        written = _write_model(plain, tensors, stored, folder, place)
    error = relative_error(next_token_logits(written, window_L), expected_LV)
    # Below float32, rounding may send a token to other experts; its tensors have been compared.
    exact = run.accelerator.mixed_precision == "no" and plain.dtype == stored == torch.float32
    if exact and not error <= TOLERANCE:
        raise CheckFailed(
            f"the written checkpoint is not the model that was trained: its logits differ by "
            f"{error:.2g} of their spread (at most {TOLERANCE:g} is rounding)"
        )
    done = replace(done, reload_error=error)
    _write_history(done, folder, place, job.record)
    return done


def _write_model(
    model: Any, tensors: dict[str, Tensor] | None, stored: torch.dtype, folder: Path, place: Path
) -> Any:
    """Write the same files as the original's, with the trained weights (by default, the model's
    own) in the original's dtypes; returns what they hold, read again."""
    tensors = dict(model.state_dict()) if tensors is None else tensors
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    headers = read_headers(folder)
    kept = {
        name: tensor if name.endswith("correction_bias") else tensor.to(stored)
        for name, tensor in tensors.items()
    }
    with disk_errors():
        model.save_pretrained(place, state_dict=kept)
    shutil.copyfile(folder / "config.json", place / "config.json")
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


def _check_tensors(written: Any, expected: dict[str, Tensor]) -> None:
    """Every value that was written is the one that was trained."""
    found = written.state_dict()
    for name, tensor in expected.items():
        if name not in found or not torch.equal(found[name].float(), tensor.float()):
            raise CheckFailed(f"the written checkpoint holds another {name} than was trained")


def _write_adapter(model: Any, tensors: dict[str, Tensor], label: str, place: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = label
    with disk_errors():
        model.save_pretrained(place, state_dict=tensors)
    (place / "README.md").unlink(missing_ok=True)  # peft's own card


def _with_adapter(folder: Path, place: Path) -> Any:
    """The written adapter on the model that it changes."""
    from peft import PeftModel

    base = load_model(folder, torch.float32, torch.device("cpu"))
    return PeftModel.from_pretrained(base, place).eval()


def _write_history(done: Finetuning, folder: Path, place: Path, record: Record) -> None:
    """upcycle.json and the card, with this run added to what they said."""
    entry = finetuning_summary(done) | {"upcycle": version("upcycle")}
    # What the conversion measured is no longer true of these weights.
    entry["check_before"] = record.check
    history = [*record.training, entry]
    fields = record.model_dump(exclude_unset=True) | {"check": None, "training": history}
    fields["run"] = TypeAdapter(Identity | None).dump_python(begun_run(done.out))
    (place / "upcycle.json").write_text(json.dumps(fields) + "\n")
    (place / LOG).write_text("".join(json.dumps(row) + "\n" for row in done.log))
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    section = environment.from_string(CARD).render(done=done, settings=done.settings)
    (place / "README.md").write_text(text + section, encoding="utf-8")


CARD = """

## Training

Trained by upcycle with preset `{{ settings.name }}` on {{ "{:,}".format(done.tokens) }} tokens of
`{{ settings.data.split("/")[-1] }}`: {{ settings.total_steps }} steps of {{ settings.batch_size }}
sequences of {{ settings.seq_len }}, learning rate {{ settings.lr }}\
{% if settings.lora %}, low-rank changes of rank {{ settings.lora }}{% endif %}; the state after
step {{ done.result_step }} was kept. What this card says above of quality was measured before.

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
"""
