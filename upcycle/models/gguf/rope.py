"""The rotary embedding of a GGUF file in transformers' words, or a refusal."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from upcycle.core.errors import UpcycleError
from upcycle.models.gguf.file import GgufFile
from upcycle.models.gguf.metadata import Metadata

DIVISORS = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
TABLES = (DIVISORS, SHORT, LONG)
"""Tensors that hold a divisor for each rotary frequency."""
LOW, HIGH = 1.0, 4.0
ORIGINALS = (8192, *(2**power for power in range(7, 21)))
"""What rope_type llama3 is set to in models: low_freq_factor, high_freq_factor, and what
original_max_position_embeddings may be, the most likely first."""


def rope_fields(
    file: GgufFile, meta: Metadata, shape: Mapping[str, Any], *, partial: bool = False
) -> dict[str, Any]:
    """The config fields of the rotary embedding.

    Args:
        shape: what `shape_fields` found.
        partial: whether transformers' class can rotate a part of each head.

    Raises:
        UpcycleError: its keys or tensors say what transformers has no words for.
    """
    theta = {"rope_theta": meta.number("rope.freq_base", 10000.0)}
    head_dim, context = shape["head_dim"], shape["max_position_embeddings"]
    rotary = meta.number("rope.dimension_count", head_dim)
    if rotary != head_dim:
        if not partial:
            raise UpcycleError(
                f"{file.label} sets rope.dimension_count={rotary} for heads of {head_dim} "
                f"channels, but {file.architecture} in transformers rotates whole heads"
            )
        theta["partial_rotary_factor"] = rotary / head_dim
    # Whether a model was trained with its scaling changes nothing in what it computes.
    meta.take("rope.scaling.finetuned")
    original = meta.number("rope.scaling.original_context_length", context)
    scaling = _scaling(file, meta, theta["rope_theta"], rotary, original)
    return {"rope_parameters": theta | scaling}


def _scaling(
    file: GgufFile, meta: Metadata, theta: float, rotary: int, original: int
) -> dict[str, Any]:
    """How frequencies are scaled; with llama.cpp's defaults."""
    tables = {name: file.numbers(name) for name in TABLES if name in file.tensors}
    for name, divisors in tables.items():
        if len(divisors) != rotary // 2:
            raise UpcycleError(
                f"{name} in {file.label} has {len(divisors)} values for {rotary // 2} rotary "
                "frequencies"
            )
    # The second is what the first was called once.
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0))
    kind = meta.take("rope.scaling.type", "longrope" if SHORT in tables else "linear")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        kind = "default"
    match kind, list(tables):
        case "default", []:
            return {"rope_type": "default"}
        case "linear", []:
            return {"rope_type": "linear", "factor": factor}
        case "yarn", []:
            return _yarn(meta, factor, original)
        case "default", [name] if name == DIVISORS:
            return _llama3(file.label, tables[DIVISORS], theta)
        case "longrope", [short, long] if (short, long) == (SHORT, LONG):
            return _longrope(meta, tables, original)
    beside = "".join(f" and {name}" for name in tables)
    raise UpcycleError(
        f"{file.label} scales its rotary embedding in a way that upcycle does not understand: "
        f"rope.scaling.type {kind}{beside}"
    )


def _yarn(meta: Metadata, factor: float, original: int) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": meta.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": meta.number("rope.scaling.yarn_beta_slow", 1.0),
    }


def _longrope(meta: Metadata, tables: dict[str, Tensor], original: int) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": tables[SHORT].tolist(),
        "long_factor": tables[LONG].tolist(),
        "original_max_position_embeddings": original,
    }
    attention = meta.take("rope.scaling.attn_factor")
    return scaling if attention is None else scaling | {"attention_factor": float(attention)}


def _llama3(label: str, divisors: Tensor, theta: float) -> dict[str, Any]:
    """The parameters of rope_type llama3 that these divisors come from."""
    if bool((divisors == 1).all()):
        return {"rope_type": "default"}
    scaling: dict[str, Any] = {"rope_type": "llama3", "factor": round(float(divisors.max()), 4)}
    for original in ORIGINALS:
        expected = llama3_divisors(theta, 2 * len(divisors), scaling["factor"], original)
        if torch.allclose(divisors, expected, rtol=1e-5):
            return scaling | {
                "low_freq_factor": LOW,
                "high_freq_factor": HIGH,
                "original_max_position_embeddings": original,
            }
    raise UpcycleError(
        f"{label} scales its rotary embedding by {DIVISORS}, whose values are not those of "
        "llama 3, and upcycle understands no others"
    )


def llama3_divisors(theta: float, rotary: int, factor: float, original: int) -> Tensor:
    """What llama 3 divides each rotary frequency by, [rotary / 2]: nothing for the high ones, the
    factor for the low ones, and in between what makes the inverses rise evenly."""
    turns = original * theta ** -(torch.arange(0, rotary, 2) / rotary) / (2 * math.pi)
    smooth = ((turns - LOW) / (HIGH - LOW)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
