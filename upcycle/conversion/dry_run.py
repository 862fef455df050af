"""A dry run: the config, names and shapes that a conversion will write, before there are values."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from upcycle.conversion.beside import Beside
from upcycle.conversion.units import PARTS
from upcycle.core.types import DenseFFN, Geometry, MoELayer
from upcycle.models.assemble import (
    Named,
    assemble_embeddings,
    assemble_head,
    assemble_layer,
    in_whole,
)
from upcycle.models.source import DenseSource
from upcycle.models.targets import TARGETS, MoESpec, MoETarget, common_fields
from upcycle.models.traits import Architecture, Trait
from upcycle.models.writer import TensorSpec


def planned_units(
    source: DenseSource, target: str, spec: MoESpec, dtype: torch.dtype, beside: Beside
) -> dict[str, tuple[TensorSpec, ...]]:
    """A dry run on the meta device: the names and shapes that the conversion will write."""

    def meta(names: Iterable[str], prefix: str = "") -> dict[str, Tensor]:
        empty = {
            n.removeprefix(prefix): torch.empty(source.tensors[n].shape, dtype=dtype, device="meta")
            for n in names
        }
        return source.canonical(empty)

    def layer(place: str, names: list[str], *, routed: bool) -> Named:
        moe = _meta_layer(spec, source.arch, dtype) if routed else None
        return assemble_layer(host, source.arch, place, meta(names, place), moe, spec.gains)

    host, outer = TARGETS[target], meta(source.outer_names())
    named = {"embeddings": assemble_embeddings(host, outer)}
    for i in range(source.arch.num_layers):
        routed = i in source.arch.ffn_layers and i not in spec.dense_layers
        place = f"model.layers.{i}."
        named[f"layer {i}"] = layer(place, source.layer_names(i), routed=routed)
    named["head"] = assemble_head(host, source.arch, outer)
    units = {unit: _specs(in_whole(host, source.layout, each)) for unit, each in named.items()}
    for place in beside.drafts:
        names = [name for name in source.draft_names() if name.startswith(place)]
        units[place] = _specs(layer(place, names, routed=True))
    if beside.kept:
        kept = {source.layout.stored(name): tensor for name, tensor in meta(beside.kept).items()}
        units[PARTS] = _specs(kept.items())
    return units


def _specs(named: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tuple(t.shape), t.dtype) for name, t in named)


def _meta_layer(spec: MoESpec, arch: Architecture, dtype: torch.dtype) -> MoELayer:
    def ffn(size: int) -> DenseFFN:
        rows = torch.empty(size, arch.hidden_size, dtype=dtype, device="meta")
        gate = None if Trait.UNGATED in arch.traits else rows
        return DenseFFN(gate, rows, rows.T, act=lambda x: x)

    router_ED = torch.empty(spec.geometry.num_experts, arch.hidden_size, dtype=dtype, device="meta")
    shared = ffn(spec.geometry.shared_size) if spec.geometry.shared_size else None
    granularity = spec.geometry.granularity
    expert = ffn(spec.geometry.expert_size)
    return MoELayer(router_ED, lambda e: expert, shared, granularity=granularity)


def active_params(
    units: Mapping[str, tuple[TensorSpec, ...]],
    geometry: Geometry,
    arch: Architecture,
    target: MoETarget,
    layers: int,
) -> int:
    """Parameters that a token uses, where so many layers have experts."""
    total = sum(s.numel for unit in units.values() for s in unit)
    matrices = 3 if target.gated else 2
    return total - geometry.idle_neurons * matrices * arch.hidden_size * layers


def planned_config(
    arch: Architecture, target: str, spec: MoESpec, dtype: torch.dtype
) -> dict[str, Any]:
    made = TARGETS[target]
    config = common_fields(arch, made, dtype) | made.config(arch, spec)
    if not arch.head:
        bare = [name.replace("ForCausalLM", "Model") for name in config["architectures"]]
        config["architectures"] = bare
    return config
