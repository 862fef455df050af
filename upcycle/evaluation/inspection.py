"""What a model is: facts from its config, its headers and its record."""

from pathlib import Path
from typing import Any

import torch

from upcycle.models.blocks import SELECTION_BIAS
from upcycle.models.checkpoint import Checkpoint
from upcycle.models.config import read_config
from upcycle.models.hosted import target_of
from upcycle.models.opening import open_located
from upcycle.models.record.check import check_summary
from upcycle.models.record.file import RECORD, Made, read_record
from upcycle.models.source import DenseSource


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


def inspect_found(label: str, found: Checkpoint | None) -> dict[str, Any]:
    """What a model is, dense or not."""
    if found is not None and has_experts(found):
        return inspect_moe(label, found)
    return inspect_dense(open_located(label, found))


def has_experts(found: Checkpoint) -> bool:
    return target_of(read_config(found.folder)) is not None


def inspect_moe(label: str, found: Checkpoint) -> dict[str, Any]:
    """What an MoE is and, if upcycle made it, how it came to be.

    Raises:
        UpcycleError: its record is not what upcycle writes.
    """
    whole = read_config(found.folder)
    config, target = whole.get_text_config(), target_of(whole)
    headers = found.headers()
    routed = {n: torch.Size(i.shape).numel() for n, i in headers.items() if is_routed(n)}
    total = sum(torch.Size(info.shape).numel() for info in headers.values())
    experts = _first(config, "num_local_experts", "num_experts")
    names = ("num_experts_per_tok", "top_k_experts")
    lone = target is not None and target.most_top_k == 1
    top_k = 1 if lone else _first(config, *names)
    layers = config.num_hidden_layers
    if config.is_encoder_decoder:
        layers += config.num_decoder_layers
    report = {
        "model": label,
        "kind": "moe",
        "architecture": target.name if target else config.model_type,
        "layers": layers,
        "hidden_size": config.hidden_size,
        "expert_size": _first(config, "moe_intermediate_size", "intermediate_size", "d_ff"),
        "experts": experts,
        "top_k": top_k,
        "tied_embeddings": config.tie_word_embeddings,
        "params_total": total,
        "params_active": total - sum(routed.values()) * (experts - top_k) // experts,
    }
    record = found.folder / RECORD
    return report | _origin(record) if record.is_file() else report


def _first(config: Any, *names: str) -> int:
    """The config's field that has one of these names."""
    return int(next(getattr(config, name) for name in names if hasattr(config, name)))


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
    stacked = ".experts." in name and not name.endswith(SELECTION_BIAS)
    return stacked or any(part in name for part in fused)
