"""Quantised weights: which of a checkpoint's tensors are one matrix, and how it comes to be again.

Every matrix is dequantised when it is read, by transformers or by the library whose format it is.
Scales of activations and of key-value caches do not belong to the dense model.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import blaming

PART = re.compile(r"(.+)\.(weight|weight_\w+|qweight|qzeros|scales)")
"""A module and what a tensor is to its matrix."""
ACTIVATIONS = re.compile(
    r".+\.((input|output|activation|[qkv]|kv)_(scale|zero_point|global_scale|g_idx))"
)
LINK = "model.gguf"
"""Of a folder, what leads to a GGUF file that holds its weights."""
FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("weight_scale_inv", "weight_scale")
"""Two words for what an FP8 weight is multiplied by."""
UNQUANTISED = (
    "start from the unquantised checkpoint, which the card of this one names as base_model"
)
NEEDED = "reading its quantised weights needs `pip install upcycle[quantised]`"
CONTAINERS = {"I32": 32, "U8": 8}
"""Bits of what several weights of fewer bits are packed into."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor as it lies in a file."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    """In the words of safetensors."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix that is stored as several tensors."""

    parts: Mapping[str, Part]
    """By what each is to the matrix, such as `weight_scale`."""
    shape: tuple[int, ...]
    unpack: Callable[[dict[str, Tensor]], Tensor]
    """From the parts to the matrix, in any dtype of floating point."""


Pack = Callable[[str, Mapping[str, Part]], Packed]
"""From a module's name and its tensors to its matrix. Raises UpcycleError where that can't be."""


def packing(quantization: Mapping[str, Any], where: str) -> Pack:
    """How the matrices of a checkpoint with this `quantization_config` are put together.

    Args:
        where: what names the checkpoint's config in errors.

    Raises:
        UpcycleError: nothing on a CPU dequantises them, or what does is not installed.
    """
    method = str(quantization.get("quant_method"))
    if method == "modelopt" and quantization.get("quant_algo") == "FP8":
        method = "fp8"
    if method not in METHODS:
        raise UpcycleError(
            f"{where} has a quantization_config of {method}, which can't be dequantised here "
            f"({', '.join(METHODS)} can): {UNQUANTISED}"
        )
    return METHODS[method](quantization, where)


def dequantised(parts: Mapping[str, Part], pack: Pack) -> dict[str, Part | Packed]:
    """The matrices and other tensors of a checkpoint, by the names that they would have in it if it
    were not quantised.

    Raises:
        UpcycleError: a matrix lacks a part, or is not what the config says.
    """
    modules: dict[str, dict[str, Part]] = {}
    found: dict[str, Part | Packed] = {}
    for name, part in parts.items():
        match = PART.fullmatch(name)
        if match is not None:
            modules.setdefault(match[1], {})[match[2]] = part
        elif not ACTIVATIONS.fullmatch(name):
            found[name] = part
    for module, its_parts in modules.items():
        plain = its_parts.keys() == {"weight"} and its_parts["weight"].dtype not in FP8
        packed = its_parts["weight"] if plain else pack(module, its_parts)
        found[f"{module}.weight"] = packed
    return found


# --- FP8 as model makers publish it ------------------------------------------------------------


def _fp8(quantization: Mapping[str, Any], where: str) -> Pack:
    return partial(_pack_fp8, quantization.get("weight_block_size"))


def _pack_fp8(block: list[int] | None, module: str, parts: Mapping[str, Part]) -> Packed:
    """A matrix with a scale of its own, one for each row, or one for each block."""
    scale = next((name for name in SCALES if name in parts), None)
    if scale is None or "weight" not in parts:
        raise UpcycleError(
            f"{module} holds {', '.join(sorted(parts))}, but no weight and its scale"
        )
    weight, scales = parts["weight"], parts[scale]
    rows, columns = weight.shape
    size = (block[0], block[1]) if block and len(scales.shape) == 2 else (1, columns)
    grid = (-(-rows // size[0]), -(-columns // size[1]))
    if scales.shape not in ((), (1,), (1, 1), (rows,), (rows, 1), grid):
        raise UpcycleError(
            f"{scales.name} in {scales.file} has shape {list(scales.shape)}, which is none of "
            f"scales for {rows} × {columns} weights in blocks of {size[0]} × {size[1]}"
        )
    kept = {"weight": weight, "scale": scales}
    return Packed(kept, weight.shape, partial(_scaled, size if scales.shape == grid else None))


def _scaled(block: tuple[int, int] | None, parts: dict[str, Tensor]) -> Tensor:
    """By transformers, which takes whole blocks only."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scales = parts["weight"].float(), parts["scale"]
    rows, columns = weight.shape
    if scales.dtype != torch.uint8:  # which are exponents
        scales = scales.float()
    if scales.ndim == 1 and len(scales) == rows:
        scales = scales[:, None]
    if block is not None:
        weight = pad(weight, (0, -columns % block[1], 0, -rows % block[0]))
    whole = Fp8Dequantize(None).convert({"weight": weight, "weight_scale_inv": scales})
    matrix: Tensor = whole["weight"][:rows, :columns]
    return matrix


# --- compressed-tensors, and AWQ, which it converts to a format of its own ---------------------


def _compressed_tensors(quantization: Mapping[str, Any], where: str) -> Pack:
    sparsity = (quantization.get("sparsity_config") or {}).get("format", "dense")
    if quantization.get("transform_config") or sparsity != "dense":
        raise UpcycleError(
            f"{where} has a quantization_config that also rotates or thins out the weights, which "
            f"is not undone here: {UNQUANTISED}"
        )
    with _library(where):
        from compressed_tensors.quantization import QuantizationConfig

        config = QuantizationConfig.model_validate(quantization)
    return partial(_pack_compressed, config)


@contextmanager
def _library(where: str) -> Iterator[None]:
    try:
        with blaming(f"{where} has a quantization_config that compressed-tensors does not read"):
            yield
    except UpcycleError as error:
        if isinstance(error.__cause__, ImportError):
            raise UpcycleError(f"{where}: {NEEDED}") from error
        raise


def _pack_compressed(config: Any, module: str, parts: Mapping[str, Part]) -> Packed:
    scheme = _scheme(config, module)
    stored = parts.get("weight_packed", parts.get("weight"))
    if scheme is None or stored is None or "weight_scale" not in parts:
        raise UpcycleError(
            f"{module} holds {', '.join(sorted(parts))}, which is not what config.json's "
            "quantization_config says"
        )
    *rows, columns = stored.shape
    if "weight_packed" in parts:
        columns = columns * CONTAINERS.get(stored.dtype, 0) // scheme.weights.num_bits
    return Packed(parts, (*rows, columns), partial(_decompressed, _format(config, scheme), scheme))


def _scheme(config: Any, module: str) -> Any:
    """What config.json says of a module's weights: by its name, else by its class."""
    from compressed_tensors.utils.match import match_name

    schemes = [scheme for scheme in config.config_groups.values() if scheme.weights is not None]
    named = [s for s in schemes if any(match_name(module, target) for target in s.targets)]
    linear = [s for s in schemes if "Linear" in s.targets]
    return next(iter(named + linear + schemes), None)


def _format(config: Any, scheme: Any) -> str:
    from compressed_tensors.compressors.format import infer_module_format

    said = scheme.format or config.format
    if said in (None, "fakequant", "mixed-precision"):
        said = infer_module_format(torch.nn.Linear, scheme)
    return str(getattr(said, "value", said))


def _decompressed(form: str, scheme: Any, parts: dict[str, Tensor]) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor

    weight: Tensor = BaseCompressor.get_value_from_registry(form).decompress(parts, scheme)[
        "weight"
    ]
    return weight


def _awq(quantization: Mapping[str, Any], where: str) -> Pack:
    with _library(where):
        from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

        converter = AutoAWQConverter.from_autoawq_config(dict(quantization))
    return partial(_pack_awq, converter)


def _pack_awq(converter: Any, module: str, parts: Mapping[str, Part]) -> Packed:
    if not {"qweight", "scales"} <= parts.keys():
        raise UpcycleError(
            f"{module} holds {', '.join(sorted(parts))}, which AWQ does not store weights as"
        )
    inputs, outputs = parts["qweight"].shape
    shape = (outputs * CONTAINERS["I32"] // converter.bits, inputs)
    return Packed(parts, shape, partial(_unpacked_awq, converter))


def _unpacked_awq(converter: Any, parts: dict[str, Tensor]) -> Tensor:
    config = converter.update_config(None)
    (scheme,) = config.config_groups.values()
    converted = converter.process({f"matrix.{name}": part for name, part in parts.items()})
    local = {name.removeprefix("matrix."): part for name, part in converted.items()}
    return _decompressed(_format(config, scheme), scheme, local)


METHODS: Mapping[str, Callable[[Mapping[str, Any], str], Pack]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "mxfp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
}


def quantization_of(fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json says of how the weights are quantised, if they are."""
    inner = fields.get("text_config") or {}
    said = fields.get("quantization_config") or inner.get("quantization_config")
    return said if isinstance(said, Mapping) else None
