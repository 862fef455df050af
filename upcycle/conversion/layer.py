"""One layer's conversion: from a dense FFN to experts and a router."""

import torch
from torch import Tensor

from upcycle.conversion.converted import ConvertedLayer, Inputs, token_weights
from upcycle.conversion.fit.loop import Tell
from upcycle.conversion.plan import Plan
from upcycle.core.types import DenseFFN, LayerActivations
from upcycle.evaluation.distance import Meter


@torch.no_grad()
def convert_layer(
    plan: Plan,
    layer: int,
    ffn: DenseFFN,
    activations: LayerActivations | None = None,
    norm_T: Tensor | None = None,
    wanted_TD: Tensor | None = None,
    gate_ED: Tensor | None = None,
    meter: Meter | None = None,
    tell: Tell = lambda done, steps: None,
) -> ConvertedLayer:
    """Turn one dense FFN into experts and a router.

    Args:
        ffn: in the source's dtype.
        activations: the same FFN's in float32 on the calibration tokens, if the plan streams them.
        norm_T: of what its output is added to. An error counts relative to it, else a few tokens
            with massive activations would own every fit.
        wanted_TD: the output that would bring the hidden states back to the dense model's, if the
            plan has feedback.
        gate_ED: the router's rows, where text has made them.
        meter: of a merge, is shown the models' FFNs as they are read.
        tell: is told of the steps of a fit.
    """
    if activations is None:
        activations = LayerActivations(ffn, ffn.up_FD.new_empty(0, ffn.hidden_size))
    weight_T = None
    if (plan.design.compensates or plan.design.fits) and norm_T is not None:
        weight_T = token_weights(norm_T)
    ffns = plan.sources.ffns(layer, ffn, meter) if plan.sources else ()
    inputs = Inputs(layer, ffn, activations, weight_T, wanted_TD, ffns, gate_ED, tell)
    return plan.way.make(plan.design, inputs)
