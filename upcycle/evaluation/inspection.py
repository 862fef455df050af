"""What a model is: facts from its config, its headers and its record."""

from pathlib import Path
from typing import Any

import torch

from upcycle.models.families import is_dense
from upcycle.models.record import RECORD, Made, check_summary, read_record
from upcycle.models.source import DenseSource, model_folder, read_config, read_headers
from upcycle.models.targets import TARGETS


def inspect_dense(source: DenseSource) -> dict[str, Any]:
    """What a dense model is."""
    arch = source.arch
    neurons = arch.intermediate_size
    params = sum(torch.Size(info.shape).numel() for info in source.tensors.values())
    ffn = arch.ffn_params * len(arch.ffn_layers)
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
    }


def moe_folder(model: str, revision: str | None = None) -> Path | None:
    """The folder of a model with experts; None of any other."""
    folder = model_folder(model, revision)
    if folder is None:
        return None
    config = read_config(folder)
    return folder if config.model_type in TARGETS and not is_dense(config) else None


def inspect_moe(label: str, folder: Path) -> dict[str, Any]:
    """What an MoE is and, if upcycle made it, how it came to be.

    Raises:
        UpcycleError: its record is not what upcycle writes.
    """
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
    record = folder / RECORD
    return report | _origin(record) if record.is_file() else report


def _origin(path: Path) -> dict[str, Any]:
    made = read_record(path)
    if not isinstance(made, Made):
        return {}  # a model of other origin that was trained here
    return {
        "made_from": made.source.name,
        "method": made.plan.method,
        "active_ffn_ratio": made.plan.active_ffn_ratio,
        "check": None if made.check is None else check_summary(made.check),
    }


def is_routed(name: str) -> bool:
    """Whether a tensor of a target's hub layout belongs to the routed experts."""
    fused = ("block_sparse_moe.input_linear", "block_sparse_moe.output_linear")
    return ".experts." in name or any(part in name for part in fused)
