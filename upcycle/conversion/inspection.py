"""What a model is, which methods there are, which machine this is: facts for people to look at."""

import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import BaseModel, FiniteFloat, ValidationError

from upcycle.conversion.compensate import COMPENSATIONS
from upcycle.conversion.geometry import legal_parts
from upcycle.conversion.plan import refusals
from upcycle.conversion.recipe import Recipe
from upcycle.conversion.ways import WAYS
from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import first_problem, read_json
from upcycle.core.versions import versions
from upcycle.models.source import DenseSource, model_folder, open_source, read_config, read_headers
from upcycle.models.targets import TARGETS
from upcycle.router_init import ROUTERS
from upcycle.split import SPLITS
from upcycle.split.copies import PERTURBS
from upcycle.split.shared import SHARED


def inspect_model(model: str, *, revision: str | None = None) -> dict[str, Any]:
    """Facts about a dense model or an MoE, from its config and headers.

    Raises:
        UpcycleError: it is not a model that upcycle can read.
    """
    folder = model_folder(model, revision)
    if folder is not None and read_config(folder).model_type in TARGETS:
        return _inspect_moe(model, folder)
    return _inspect_dense(open_source(model, revision=revision))


def _inspect_dense(source: DenseSource) -> dict[str, Any]:
    arch = source.arch
    neurons = arch.intermediate_size
    divisors = [n for n in legal_parts(neurons) if n > 1]
    params = sum(torch.Size(info.shape).numel() for info in source.tensors.values())
    ffn = 3 * arch.hidden_size * neurons * arch.num_layers
    targets = refusals(arch, Recipe())
    return {
        "model": source.label,
        "kind": "dense",
        "architecture": arch.family,
        "layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "intermediate_size": neurons,
        "activation": arch.fields["hidden_act"],
        "tied_embeddings": arch.tied,
        "dtype": str(source.dtype).removeprefix("torch."),
        "params_total": params,
        "params_active": params,
        "params_ffn": ffn,
        "experts_possible": [n for n in divisors if n <= 512],
        "traits": {trait.value: why for trait, why in arch.traits.items()},
        "targets": {name: why or "ok" for name, why in targets.items()},
    }


def _inspect_moe(label: str, folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    headers = read_headers(folder)
    routed = {n: torch.Size(i.shape).numel() for n, i in headers.items() if is_routed(n)}
    total = sum(torch.Size(info.shape).numel() for info in headers.values())
    experts = (
        config.num_local_experts if hasattr(config, "num_local_experts") else config.num_experts
    )
    top_k = config.num_experts_per_tok
    report = {
        "model": label,
        "kind": "moe",
        "architecture": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "expert_size": getattr(config, "moe_intermediate_size", config.intermediate_size),
        "experts": experts,
        "top_k": top_k,
        "tied_embeddings": config.tie_word_embeddings,
        "params_total": total,
        "params_active": total - sum(routed.values()) * (experts - top_k) // experts,
    }
    record = folder / "upcycle.json"
    return report | _origin(record) if record.is_file() else report


def _origin(record: Path) -> dict[str, Any]:
    """What upcycle.json says of how the checkpoint was made."""
    fields = read_json(record, OURS)
    if isinstance(fields, dict) and "plan" not in fields and "training" in fields:
        return {}  # a model of other origin that was trained here
    try:
        made = _Record.model_validate(fields)
    except ValidationError as error:
        raise UpcycleError(
            f"{record} is not {OURS}: {first_problem(error)}: restore or delete it"
        ) from error
    return {
        "made_from": made.source.name,
        "method": made.plan.method,
        "active_ffn_ratio": made.plan.active_ffn_ratio,
        "check": made.check and made.check.model_dump(),
    }


OURS = "what upcycle writes"


class _Source(BaseModel):
    name: str


class _Plan(BaseModel):
    method: str
    active_ffn_ratio: FiniteFloat


class _Check(BaseModel, extra="allow"):
    perplexity_ratio: float


class _Record(BaseModel):
    """What is shown of upcycle.json."""

    source: _Source
    plan: _Plan
    check: _Check | None


def is_routed(name: str) -> bool:
    """Whether a tensor of a target's hub layout belongs to the routed experts."""
    fused = ("block_sparse_moe.input_linear", "block_sparse_moe.output_linear")
    return ".experts." in name or any(part in name for part in fused)


def registered() -> dict[str, Any]:
    """Every registered method with its parameters and their defaults, every way and every target:
    what catalogue.json holds."""
    registries = (SPLITS, SHARED, ROUTERS, COMPENSATIONS, PERTURBS)
    methods = [
        {
            "kind": registry.kind,
            "name": method.name,
            "summary": method.summary,
            "paper": method.paper,
            "parameters": method.params().model_dump(),
            "needs_text": method.needs_activations,
        }
        for registry in registries
        for method in registry.values()
    ]
    return {"methods": methods, "ways": list(WAYS), "targets": list(TARGETS)}


def describe_environment() -> dict[str, str]:
    """Versions and the machine."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return versions() | {
        "system": platform.platform(),
        "cpus": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "gpus": ", ".join(gpus) or "none",
    }
