"""Which layers to keep dense: those whose conversion would hurt the model's output most.

Damage is very uneven, and no local error foretells it: in SmolLM2 the first layer alone costs
as much as seven others. So it is measured: a few tokens go through the dense model once,
and in each layer a branch leaves that has this layer's FFN cut down, and no other's. Where a
branch ends, its divergence from the dense model is that layer's damage.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers.activations import ACT2FN

from upcycle.assemble import EMBEDDINGS, dense_ffn
from upcycle.budget import moe_share
from upcycle.dense import HiddenStream
from upcycle.planning import Plan
from upcycle.targets import TARGETS
from upcycle.types import DenseFFN, LayerActivations

TOKENS = 1024
# Measured: perplexity's logarithm grows like the share that is off to this power.
DAMAGE_EXPONENT = 1.6


def choose_dense_layers(
    plan: Plan, tokens_BL: Tensor, progress: Callable[[str, int, int], None]
) -> tuple[tuple[int, ...], list[float]]:
    """The layers to keep dense, and each layer's damage.

    Args:
        plan: with no layer dense.
        tokens_BL: calibration tokens; the first 1024 are used.
    """
    damage = measure_damage(plan, tokens_BL[: damage_sequences(tokens_BL.shape[1])], progress)
    kind = TARGETS[plan.target].dense_layers
    most = len(plan.geometries()) - 1
    return best_dense_layers(damage, plan.active_ffn_ratio, kind, most), damage


def damage_sequences(seq_len: int) -> int:
    """How many of the calibration sequences damage is measured on."""
    return max(1, TOKENS // seq_len)


def best_dense_layers(
    damage: list[float], active: float, kind: str, most: int | None = None
) -> tuple[int, ...]:
    """The layers without which the damage is least, if the others must get by with fewer neurons
    so that the active share stays the same.

    Args:
        damage: per layer, when this layer alone is cut to the active share.
        kind: which layers a target can keep dense: `any`, `prefix` or `none`.
        most: how many layers can stay dense and leave the others experts to route; by default
            all but one.
    """
    if active >= 1 or kind == "none":
        return ()
    layers = range(len(damage))
    order = list(layers) if kind == "prefix" else sorted(layers, key=lambda i: -damage[i])
    best, least = 0, sum(damage)
    for count in layers if most is None else layers[: most + 1]:
        share = moe_share(active, len(damage), count)
        if share <= 0:
            break
        growth = ((1 - share) / (1 - active)) ** DAMAGE_EXPONENT
        total = growth * sum(damage[i] for i in order[count:])
        if total < least:
            best, least = count, total
    return tuple(sorted(order[:best]))


@torch.no_grad()
def measure_damage(
    plan: Plan, tokens_BL: Tensor, progress: Callable[[str, int, int], None]
) -> list[float]:
    """KL(dense ‖ branch) per layer, in nats per token."""
    source = plan.source
    outer = source.read(source.outer_names())
    embed_VD = source.canonical(outer)[EMBEDDINGS]
    stream = HiddenStream(source.config, embed_VD, tokens_BL, plan.device)
    layers = source.arch.num_layers
    kept = round(plan.geometry.active_ratio * source.arch.intermediate_size)
    for layer in range(layers):
        progress("measuring layers", layer, layers)
        raw = source.read_layer(layer)
        x_TD, _ = stream.attend(layer, raw)
        ffn = dense_ffn(source.canonical(raw), ACT2FN[source.arch.fields["hidden_act"]])
        base_TD = x_TD[: tokens_BL.numel()]
        ffn = strongest(ffn.to(base_TD.device, base_TD.dtype), base_TD, kept)
        stream.branch(layer, ffn(base_TD))
        stream.advance(layer)
    progress("measuring layers", layers, layers)
    outputs = stream.log_probs(outer)
    dense_BLV = next(outputs)
    tokens = tokens_BL.numel()
    return [
        kl_div(out_BLV, dense_BLV, log_target=True, reduction="sum").item() / tokens
        for out_BLV in outputs
    ]


def strongest(ffn: DenseFFN, x_TD: Tensor, kept: int) -> DenseFFN:
    """The FFN of the `kept` neurons that put out most on x: no router, the least that a split
    achieves."""
    return ffn.take(LayerActivations(ffn, x_TD).energy().topk(kept).indices.sort().values)
