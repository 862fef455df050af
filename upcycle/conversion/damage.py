"""Damage: how much the model's output suffers when one layer's FFN is cut down.

It is very uneven, and no local error foretells it: in SmolLM2 the first layer alone costs as much
as seven others. So it is measured: a few tokens go through the dense model once, and in each layer
a branch leaves that has this layer's FFN cut down, and no other's. Where a branch ends, its
divergence from the dense model is that layer's damage.
"""

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers.activations import ACT2FN

from upcycle.conversion.plan import Plan
from upcycle.core.progress import Progress
from upcycle.core.types import DenseFFN, LayerActivations
from upcycle.models.assemble import dense_ffn
from upcycle.models.stream import HiddenStream


@torch.no_grad()
def measure_damage(plan: Plan, tokens_BL: Tensor, progress: Progress) -> list[float]:
    """KL(dense ‖ branch) per layer that has an FFN, in nats per token."""
    source = plan.source
    outer = source.read(source.outer_names())
    stream = HiddenStream(source.config, outer, tokens_BL, plan.device)
    layers = source.arch.num_layers
    kept = round(plan.design.geometry.active_ratio * source.arch.intermediate_size)
    for layer in range(layers):
        progress("measuring layers", layer, layers)
        raw = source.read_layer(layer)
        if layer not in source.arch.ffn_layers:
            stream.through(layer, raw)
            continue
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
