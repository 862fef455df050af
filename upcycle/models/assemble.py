"""From a layer's tensors to the target's: names, gains, and nothing lost."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from upcycle.core.types import Activation, DenseFFN, MoELayer
from upcycle.models.names import EMBEDDINGS
from upcycle.models.targets import Gains, MoETarget
from upcycle.models.traits import Architecture

Named = Iterator[tuple[str, Tensor]]
FFN = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


def dense_ffn(tensors: Mapping[str, Tensor], act: Activation) -> DenseFFN:
    """The FFN among a layer's tensors (under llama's names, without prefix)."""
    gate, up, down = FFN
    return DenseFFN(tensors.get(gate), tensors[up], tensors[down], act)


def assemble_embeddings(target: MoETarget, outer: Mapping[str, Tensor]) -> Named:
    """What comes before the layers."""
    yield _outer_name(target, EMBEDDINGS), outer[EMBEDDINGS]


def assemble_layer(
    target: MoETarget,
    arch: Architecture,
    layer: int,
    tensors: Mapping[str, Tensor],
    moe: MoELayer | None,
    gains: Gains,
) -> Named:
    """A layer's tensors under the target's names; with `moe` in the dense FFN's place, if given.

    Args:
        tensors: all of the layer's, under llama's names without prefix.
    """
    prefix = f"{target.root}layers.{layer}."
    for name, tensor in tensors.items():
        if moe is None or name not in FFN:
            yield prefix + target.spelled.get(name, name), tensor
    gate, up, _ = FFN
    if moe is None and target.doubles(arch) and up in tensors:
        yield prefix + target.spelled.get(gate, gate), tensors[up]
    for name, tensor in target.extra(arch, tensors):
        yield prefix + name, tensor
    if moe is not None:
        for name, tensor in target.experts(moe, gains):
            yield prefix + name, tensor


def assemble_head(target: MoETarget, outer: Mapping[str, Tensor]) -> Named:
    """What comes after the layers: the last norm, and the head where it is not tied."""
    for name, tensor in outer.items():
        if name != EMBEDDINGS:
            yield _outer_name(target, name), tensor


def _outer_name(target: MoETarget, name: str) -> str:
    """The target's own name for a tensor of no layer, by llama's or the source's."""
    spelled = target.spelled.get(name, name)
    inside = spelled.removeprefix("model.")
    return spelled if inside == spelled else target.root + inside
