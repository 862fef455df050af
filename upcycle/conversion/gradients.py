"""The loss's gradient at every FFN's output, by a pass through the dense model and back.

Forwards, the hidden states that enter each layer are put aside on the disk; backwards, each layer
is read again and run with them, and the gradient at its FFN's output takes their place. So one
layer's weights are in memory at a time, as in the rest of a conversion, and a finished pass need
not be repeated when a run is resumed.
"""

import torch
from torch import Tensor

from upcycle.conversion.plan import Plan
from upcycle.core.errors import UpcycleError
from upcycle.core.progress import Progress
from upcycle.core.types import LossGradient, all_finite
from upcycle.models.stream import HiddenStream
from upcycle.models.workspace import Workspace

GRADIENTS = "loss gradients"


def put_gradients_aside(
    plan: Plan, tokens_BL: Tensor, workspace: Workspace, progress: Progress
) -> None:
    """Make what `loss_gradient` takes up again, unless an earlier run did.

    Raises:
        UpcycleError: the gradient overflows.
    """
    if GRADIENTS in workspace.records:
        return
    source, layers = plan.source, plan.source.arch.num_layers
    embeddings = source.read(source.embedding_names())
    stream = HiddenStream(source.config, embeddings, tokens_BL, plan.device)
    del embeddings
    for layer in range(layers):
        progress("backward pass", layer, 2 * layers)
        workspace.keep(_unit(layer), {"entering": stream.entering()})
        stream.through(layer, source.read_layer(layer), to_return=True)
    stream.to_loss(source.read(source.outer_names()))
    for layer in reversed(range(layers)):
        progress("backward pass", 2 * layers - 1 - layer, 2 * layers)
        entering_TD = workspace.kept(_unit(layer))["entering"]
        bare = layer not in source.arch.ffn_layers
        gradient_TD = stream.back(layer, source.read_layer(layer), entering_TD, bare=bare)
        if gradient_TD is not None:
            _check_finite(gradient_TD, layer)
            workspace.keep(_unit(layer), {"gradient": gradient_TD})
    progress("backward pass", 2 * layers, 2 * layers)
    workspace.done(GRADIENTS, {})


def _check_finite(gradient_TD: Tensor, layer: int) -> None:
    if not all_finite(gradient_TD):
        raise UpcycleError(
            f"the loss's gradient overflows in layer {layer} on the calibration text, in "
            f"{gradient_TD.dtype}: its weights are damaged, or need float32 (`device=cpu`)"
        )


def loss_gradient(
    plan: Plan, workspace: Workspace, layer: int, rows: Tensor | None = None
) -> LossGradient | None:
    """Of one layer, in float32, if a method of the plan looks at it.

    Args:
        rows: which of the calibration sequences, in this order; by default all.
    """
    if not plan.needs_gradients:
        return None
    y_TD = workspace.kept(_unit(layer))["gradient"].to(plan.device, torch.float32)
    y_BLD = y_TD.unflatten(0, (-1, plan.recipe.seq_len))
    y_BLD = y_BLD if rows is None else y_BLD[rows]
    texts = torch.arange(len(y_BLD), device=plan.device)
    return LossGradient(y_BLD.flatten(0, 1), texts.repeat_interleave(plan.recipe.seq_len))


def _unit(layer: int) -> str:
    return f"gradient {layer}"
