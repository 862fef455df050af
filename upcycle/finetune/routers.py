"""Routers while they are trained: in float32, watched, and at the scale that they were made for.

A router may be tempered, where experts must count the same: its logits spread by 1e-4 or so, and
the gain that makes up for its small weights is folded into down_proj. An optimiser whose step does
not depend on the size of the gradient, as Adam's, would throw such a router over in one step and
hardly move such a down_proj. `measure_scales` finds both factors; learning rates are multiplied by
them, and the routers' losses see logits of ordinary spread.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from upcycle.models.blocks import MoEBlock, watch_selections
from upcycle.models.hosted import target_of

TEMPERED = 3e-3
"""Logits that spread by less belong to a tempered router: well below the 0.01 of a split whose
experts are not refit, so that no text makes it one in some layers only."""
UNSCALED_BIAS = 0.05
"""Logits that spread by this or more are an ordinary router's, as far as selection biases go."""


@dataclass(frozen=True)
class Scale:
    """What a block's tensors are multiplied by, compared with an ordinary layer."""

    router: float = 1.0
    down_proj: float = 1.0
    spread: float = 1.0
    """Standard deviation of a token's logits, tempered or not."""

    @property
    def bias(self) -> float:
        """Of the selection bias: a step moves that of an ordinary router by what was asked for, and
        that of logits which hardly differ by as much less, or it alone would select."""
        return min(1.0, self.spread / UNSCALED_BIAS)


@dataclass
class Routed:
    """What a block's router did in one forward pass."""

    logits_TE: Tensor
    chosen_TK: Tensor
    weights_TK: Tensor
    noise_TE: Tensor | None = None
    """What was added to the logits before experts were selected, in units of their first spread."""
    noise: float = 0.0
    """Its standard deviation."""


@dataclass
class RouterTap:
    """Watches the blocks' routers during `recording`.

    The logits are computed once more, so that they do not depend on what a transformers version's
    router returns; they carry gradients. Where layers are checkpointed they run again in the
    backward pass: the logits are then computed, as the first time, but not recorded.
    """

    blocks: list[MoEBlock]
    dense_gradient: bool = False
    """Let each router see all experts' outputs (see `DenseRouterGradient`)."""
    score: Callable[[Tensor], Tensor] = field(default=lambda logits: logits.softmax(-1))
    gate: Callable[[int, Tensor, Tensor, Tensor], Any] | None = None
    """Makes of a block's place, logits and the experts and weights that its class selects the
    `Gates` of training."""
    routed: list[Routed] = field(default_factory=list)
    _on: bool = False

    def __post_init__(self) -> None:
        self._logits: list[Tensor] = [torch.empty(0)] * len(self.blocks)
        self._selecting: list[Tensor] = [torch.empty(0)] * len(self.blocks)
        for place, block in enumerate(self.blocks):
            block.router.register_forward_hook(self._see_router(place))
            block.experts.register_forward_pre_hook(self._see_experts(place))
            if self.dense_gradient:
                block.experts.register_forward_hook(self._add_dense_gradient(place))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Collect what the next forward passes do in `routed`, block after block."""
        self.routed, self._on = [], True
        try:
            yield
        finally:
            self._on = False

    def _see_router(self, place: int) -> Callable[..., None]:
        def hook(router: nn.Module, args: tuple[Tensor], _: Any) -> None:
            self._logits[place] = _logits(router, args[0])

        return hook

    def _see_experts(self, place: int) -> Callable[..., Any]:
        def hook(experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> Any:
            (x_TD, chosen_TK, weights_TK), logits_TE = args, self._logits[place]
            routed, self._selecting[place] = Routed(logits_TE, chosen_TK, weights_TK), logits_TE
            if self.gate is not None and experts.training:
                gates = self.gate(place, logits_TE, chosen_TK, weights_TK)
                chosen_TK, weights_TK = gates.chosen_TK, gates.weights_TK.to(weights_TK.dtype)
                selected_TK = chosen_TK if gates.selected_TK is None else gates.selected_TK
                routed = Routed(logits_TE, selected_TK, weights_TK, gates.noise_TE, gates.noise)
                self._selecting[place] = gates.logits_TE
            if self._on:
                self.routed.append(routed)
            return x_TD, chosen_TK, weights_TK.detach() if self.dense_gradient else weights_TK

        return hook

    def _add_dense_gradient(self, place: int) -> Callable[..., Tensor]:
        def hook(experts: Any, args: tuple[Tensor, Tensor, Tensor], y_TD: Tensor) -> Tensor:
            x_TD, chosen_TK, weights_TK = args
            block, scores_TE = self.blocks[place], self.score(self._selecting[place])
            nothing_TD: Tensor = DenseRouterGradient.apply(  # type: ignore[no-untyped-call]
                all_weights(block, scores_TE, chosen_TK, weights_TK),
                x_TD,
                block.first,
                experts.down_proj,
                experts.act_fn,
            )
            return y_TD + nothing_TD

        return hook


def all_weights(
    block: MoEBlock, scores_TE: Tensor, chosen_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """What each expert would count [T, E] if all ran, in the unit of the selected ones' weights.

    As in DenseMixer's release, the sum that weights are divided by is a function of the logits for
    the experts that are selected, and a constant for the others.
    """
    scale_E = expert_scale(block, scores_TE)
    own_TK, plain_TK = scores_TE.gather(1, chosen_TK), weights_TK / scale_E[chosen_TK]
    # What a score is multiplied by on its way to a weight: renormalisation, scaling factor.
    factor_T1 = plain_TK.detach().sum(-1, keepdim=True) / own_TK.sum(-1, keepdim=True)
    weights_TE = scores_TE * factor_T1.detach()
    if renormalises(block.router):
        weights_TE = weights_TE.scatter(1, chosen_TK, own_TK * factor_T1)
    return weights_TE * scale_E


def renormalises(router: Any) -> bool:
    """Routers that always do have no such setting."""
    return bool(getattr(router, "norm_topk_prob", True))


def expert_scale(block: MoEBlock, like_TE: Tensor) -> Tensor:
    """What each expert's weight is multiplied by at last [E]: in Gemma 4, numbers beside the
    router."""
    scale_E = getattr(getattr(block.around, "router", None), "per_expert_scale", None)
    return torch.ones_like(like_TE[0]) if scale_E is None else scale_E.to(like_TE)


def _logits(router: Any, x: Tensor) -> Tensor:
    """[T, E] in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.reshape(-1, x.shape[-1]).float(), router.weight.float())


def untempered(logits_TE: Tensor, scale: Scale) -> Tensor:
    """Logits of ordinary spread, for the routers' own losses.

    Their gradient is that of the tempered logits: else these losses would outweigh all others by
    the temperature's inverse.
    """
    return of_spread(logits_TE, scale.router)


def of_spread(logits_TE: Tensor, spread: float) -> Tensor:
    """Logits in units of a spread, with the gradient of the logits themselves."""
    return logits_TE + (logits_TE / spread - logits_TE).detach()


class DenseRouterGradient(torch.autograd.Function):
    """Adds nothing to the output, but gives each expert's score the gradient that it would have if
    all experts ran: ⟨gradient of the output, the expert's output⟩ (DenseMixer). Costs all experts'
    forward in the backward pass, one at a time."""

    @staticmethod
    def forward(
        ctx: Any, scores_TE: Tensor, x_TD: Tensor, first: Tensor, down: Tensor, act: Any
    ) -> Tensor:
        ctx.save_for_backward(x_TD, first, down)
        ctx.act, ctx.dtype = act, scores_TE.dtype
        return torch.zeros_like(x_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad_TD,) = grads
        x_TD, first_EFD, down_EDM = ctx.saved_tensors
        columns = []
        for first_FD, down_DM in zip(first_EFD, down_EDM, strict=True):
            gated = len(first_FD) > down_DM.shape[1]
            gate_TM, *up = (x_TD @ first_FD.T.to(x_TD.dtype)).chunk(2 if gated else 1, dim=-1)
            h_TM = ctx.act(gate_TM) * up[0] if gated else ctx.act(gate_TM)
            # ⟨g, W h⟩ = ⟨Wᵀ g, h⟩
            columns.append((grad_TD @ down_DM.to(grad_TD.dtype) * h_TM).sum(-1))
        return torch.stack(columns, dim=-1).to(ctx.dtype), None, None, None, None


def keep_float32(blocks: list[MoEBlock]) -> None:
    """Let the routers hold and compute in float32, whatever the rest of the model does.

    Selection biases, which no gradient moves, become buffers in the classes where they are
    parameters: nothing that trains, shards or counts parameters is to take them for one.
    """
    for block in blocks:
        if block.bias_place is not None:
            holder, name = block.bias_place
            bias = getattr(holder, name).data
            delattr(holder, name)
            holder.register_buffer(name, bias)
        block.router.float()
        block.router.forward = _in_float32(block.router.forward)


def _in_float32(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(x: Tensor, *beside: Tensor) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float(), *beside)

    return wrapped


@torch.no_grad()
def measure_scales(model: nn.Module, blocks: list[MoEBlock], tokens_BL: Tensor) -> list[Scale]:
    """Each block's scale, from one forward pass over the tokens."""
    spreads: list[float] = []
    weights: list[float] = []
    hooks = [
        block.router.register_forward_hook(
            lambda router, args, _: spreads.append(float(_logits(router, args[0]).std(-1).mean()))
        )
        for block in blocks
    ]

    def see(place: int, _: Tensor, weights_TK: Tensor) -> None:
        weights.append(blocks[place].factor * float(weights_TK.float().mean()))

    with watch_selections(blocks, see):
        model(input_ids=tokens_BL, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [
        Scale(spread, 1 / weight, spread) if 0 < spread < TEMPERED else Scale(spread=spread)
        for spread, weight in zip(spreads, weights, strict=True)
    ]


@torch.no_grad()
def update_bias(block: MoEBlock, count_E: Tensor, rate: float) -> None:
    """Balance without a loss (arXiv:2408.15664): experts that had less than their share of the
    tokens become more likely to be selected.

    Args:
        rate: by which each expert's bias moves.
    """
    bias_E = block.selection_bias
    assert bias_E is not None
    count_E = count_E.float()
    bias_E += rate * (count_E.mean() - count_E).sign().to(bias_E)


def score_of(config: PreTrainedConfig) -> Callable[[Tensor], Tensor]:
    """How the architecture makes scores of logits [T, E]."""
    target = target_of(config)
    if target is not None and target.routing.score == "sigmoid":
        return torch.sigmoid
    return lambda logits_TE: logits_TE.softmax(-1)
