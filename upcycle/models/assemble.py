"""From a layer's tensors to the target's: names, gains, and nothing lost."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING

from upcycle.core.types import Activation, DenseFFN, MoELayer
from upcycle.models.layout import TEXT, Layout
from upcycle.models.names import EMBEDDINGS, HEAD
from upcycle.models.targets import Gains, MoETarget, older_spellings
from upcycle.models.traits import Architecture

Named = Iterator[tuple[str, Tensor]]
FFN = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


def dense_ffn(tensors: Mapping[str, Tensor], act: Activation) -> DenseFFN:
    """The FFN among a layer's tensors (under llama's names, without prefix)."""
    gate, up, down = FFN
    return DenseFFN(tensors.get(gate), tensors[up], tensors[down], act)


def assemble_config(target: MoETarget, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json, as transformers 5 and others spell them."""
    fields = {name: value for name, value in config.items() if name != "model_type"}
    made = CONFIG_MAPPING[config["model_type"]](**fields)
    found: dict[str, Any] = json.loads(made.to_json_string(use_diff=True))
    spelled = older_spellings(config) | found
    return spelled | target.older(spelled)


def assemble_embeddings(target: MoETarget, outer: Mapping[str, Tensor]) -> Named:
    """What comes before the layers."""
    yield target.spelled.get(EMBEDDINGS, EMBEDDINGS), outer[EMBEDDINGS]


def assemble_layer(
    target: MoETarget,
    arch: Architecture,
    place: str,
    tensors: Mapping[str, Tensor],
    moe: MoELayer | None,
    gains: Gains,
) -> Named:
    """A layer's tensors under the target's names; with `moe` in the dense FFN's place, if given.

    Args:
        place: what their names begin with.
        tensors: all of the layer's, under llama's names without that.
    """
    gate, up, _ = FFN
    if target.doubles(arch) and up in tensors:
        tensors = {gate: tensors[up], **tensors}
    extra = dict(target.extra(arch, tensors))
    for name, tensor in tensors.items():
        if name not in extra and (moe is None or name not in FFN):
            yield place + target.spelled.get(name, name), tensor
    for name, tensor in extra.items():
        yield place + name, tensor
    if moe is not None:
        for name, tensor in target.experts(moe, gains):
            yield place + name, tensor


def assemble_head(target: MoETarget, arch: Architecture, outer: Mapping[str, Tensor]) -> Named:
    """What comes after the layers: the last norm, and the head where it is not tied; the
    embeddings again, where it is no longer."""
    outer = dict(outer)
    if arch.head and not arch.tied:
        outer.setdefault(HEAD, outer[EMBEDDINGS])
    extra = dict(target.outer(arch, outer))
    for name, tensor in (outer | extra).items():
        if name != EMBEDDINGS:
            yield target.spelled.get(name, name), tensor


def in_whole(target: MoETarget, layout: Layout, named: Named) -> Named:
    """A text model's tensors under the names that they have in the whole model's checkpoint."""
    for name, tensor in named:
        yield name_in_whole(target, layout, name), tensor


def name_in_whole(target: MoETarget, layout: Layout, name: str) -> str:
    """What a text model's tensor, under the target's name, is called in the result."""
    full = layout.full(name)
    inside = full.removeprefix(TEXT)
    return layout.stored(full if inside == full else target.root + inside)
