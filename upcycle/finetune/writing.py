"""What a training run writes: weights or low-rank changes, compared with what was trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from upcycle.core.errors import CheckFailed
from upcycle.core.paths import disk_errors, local_path, way_from
from upcycle.evaluation.result import load_result
from upcycle.finetune.activations import name_activation
from upcycle.finetune.job import Job
from upcycle.models.blocks import SELECTION_BIAS
from upcycle.models.companions import copy_companions
from upcycle.models.loading import load_model
from upcycle.models.lora import WEIGHTS
from upcycle.models.shards import INDEX, SINGLE, read_headers, reading

TRAINED, PARTS = "model-text.safetensors", "model-parts.safetensors"
"""Files of a model of several parts: of what was trained, if that is one, and of the rest."""


def write_model(
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
    check_tensors(again, kept)
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


def check_tensors(written: Any, expected: dict[str, Tensor]) -> None:
    """Every value that was written is the one that was trained."""
    found = written.state_dict()
    for name, tensor in expected.items():
        if name not in found or not torch.equal(found[name].float(), tensor.float()):
            raise CheckFailed(f"the written checkpoint holds another {name} than was trained")


def write_adapter(model: Any, tensors: dict[str, Tensor], job: Job, place: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = base_from(job)
    with disk_errors():
        model.save_pretrained(place, state_dict=tensors, save_embedding_layers=False)
        _name_as_read(place / WEIGHTS, model.get_base_model())
    copy_companions(job.folder, place)
    (place / "README.md").unlink(missing_ok=True)  # peft's own card


def _name_as_read(path: Path, model: Any) -> None:
    """Let peft find low-rank changes again: it renames what it reads as transformers does the names
    in a checkpoint, and laguna's rule for `shared_expert` spoils `shared_experts`, too."""
    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    back = [rule.reverse_transform() for rule in rules]
    tensors = load_file(path)
    spoiled = {name for name in tensors if rename_source_key(name, rules, [])[0] != name}
    if spoiled:
        names = {name: rename_source_key(name, back, [])[0] for name in spoiled}
        renamed = {names.get(name, name): tensor for name, tensor in tensors.items()}
        save_file(renamed, path, metadata={"format": "pt"})


def base_from(job: Job) -> str:
    """How an adapter at the job's place names the model that it changes: a hub id, or the way from
    its folder; where there is none that may be published, it is to lie beside it."""
    if not local_path(job.label).exists():
        return job.label
    way = way_from(job.out, job.folder)
    return way if way.startswith("..") else f"../{way}"


def with_adapter(folder: Path, place: Path) -> Any:
    """The written adapter on the model that it changes."""
    from peft import PeftModel

    base = load_model(folder, torch.float32, torch.device("cpu"))
    return PeftModel.from_pretrained(base, place, use_safetensors=True).eval()
