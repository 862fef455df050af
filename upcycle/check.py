"""The check: re-open the finished checkpoint with plain transformers, compare it with the source.

First exactness, which a correct conversion has: copies give the dense model's logits, and a split
with all its experts on does too. Then what the conversion did to the model, on text that no method
has seen: perplexity, divergence, agreement, and how tokens spread over experts.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle.device import free_memory
from upcycle.errors import CheckFailed, UpcycleError
from upcycle.evaluate import compare, decode_windows, load_model, next_token_logits
from upcycle.head import drop_layers
from upcycle.moe import moe_blocks
from upcycle.planning import Plan
from upcycle.types import DenseFFN

EXACT_TOKENS = 128

# Relative to the logits' standard deviation. A tempered router leaves an error of the order of its
# temperature; weights below float32 round their gains.
TOLERANCE = {"mean": 1e-3, "sum": 1e-2}
LOW_PRECISION_TOLERANCE = 0.1
WEIGHT_TOLERANCE = 0.01


@dataclass(frozen=True)
class CheckReport:
    """What the check measured."""

    exact_error: float | None
    """Root mean square difference of the logits over their standard deviation, with every expert
    on for a split; None for copies that were changed on purpose."""
    exact_tolerance: float
    perplexity_dense: float
    perplexity_moe: float
    kl: float
    """Mean KL(dense ‖ MoE) per token, in nats."""
    top1_agreement: float
    """Share of tokens whose most likely next token is the same."""
    tokens: int
    window: int
    load: list[list[float]]
    """Per MoE layer and expert: its share of the tokens over the fair share, K / E."""

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity_moe / self.perplexity_dense

    @property
    def dead_experts(self) -> int:
        return sum(share == 0 for layer in self.load for share in layer)


def run_check(
    plan: Plan,
    folder: Path,
    tokens_BL: Tensor,
    progress: Any,
    all_on: Iterable[tuple[int, DenseFFN]] = (),
) -> CheckReport:
    """Compare the checkpoint in `folder` with the plan's source on `tokens_BL`.

    Args:
        all_on: the layers of which all experts together are no longer the source's FFN, and the
            FFN that they come to. Exactness is measured against the dense model with these in
            place, the rest against the dense model as it is.

    Raises:
        CheckFailed: the checkpoint does not load whole, or is not exact where it must be.
    """
    dtype, total = _dtype_that_fits(plan), 2 * len(tokens_BL)
    exact_L = tokens_BL[0, :EXACT_TOKENS]
    model = load_model(plan.source.folder, dtype, plan.device)
    reference = decode_windows(model, tokens_BL, lambda done: progress("checking", done, total))
    for layer, ffn in all_on:
        _replace(model.model.layers[layer].mlp, ffn)
    exact_LV = next_token_logits(model, exact_L)
    drop_layers(model)
    model = load_result(folder, dtype, plan.device)
    low_precision = plan.dtype != torch.float32 or dtype != torch.float32
    tolerance = LOW_PRECISION_TOLERANCE if low_precision else TOLERANCE[plan.combine]
    exact_error = _exact_error(plan, model, exact_L, exact_LV)
    if exact_error is not None and not exact_error <= tolerance:
        raise CheckFailed(
            f"the finished checkpoint is not the dense model's equal: its logits differ by "
            f"{exact_error:.2g} of their spread (at most {tolerance:g} is rounding)"
        )
    moe = compare(
        model, tokens_BL, reference, lambda done: progress("checking", done + total // 2, total)
    )
    progress("checking", total, total)
    _check_weights(plan, moe.router_weights)
    return CheckReport(
        exact_error=exact_error,
        exact_tolerance=tolerance,
        perplexity_dense=moe.perplexity_against,
        perplexity_moe=moe.perplexity,
        kl=moe.kl,
        top1_agreement=moe.top1_agreement,
        tokens=tokens_BL.numel(),
        window=tokens_BL.shape[1],
        load=moe.load,
    )


def _replace(mlp: Any, ffn: DenseFFN) -> None:
    """Give a dense model's FFN other weights, and perhaps more or fewer neurons."""
    matrices = {"gate_proj": ffn.gate_FD, "up_proj": ffn.up_FD, "down_proj": ffn.down_DF}
    if hasattr(mlp, "gate_up_proj"):
        matrices["gate_up_proj"] = torch.cat([matrices.pop("gate_proj"), matrices.pop("up_proj")])
    for name, matrix in matrices.items():
        linear = getattr(mlp, name)
        linear.weight = torch.nn.Parameter(matrix.to(linear.weight), requires_grad=False)


def load_result(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """`load_model` of what was just written, whose faults are ours."""
    try:
        return load_model(folder, dtype, device)
    except UpcycleError as error:
        raise CheckFailed(str(error)) from error


def _exact_error(plan: Plan, model: Any, exact_L: Tensor, exact_LV: Tensor) -> float | None:
    """How far the logits are from the dense model's [L, V]; None where they need not be equal."""
    if plan.recipe.method.name == "copy":
        return relative_error(next_token_logits(model, exact_L), exact_LV)
    if not plan.recipe.copies:
        with _all_experts_on(model, plan):
            return relative_error(next_token_logits(model, exact_L), exact_LV)
    return None


def relative_error(logits: Tensor, reference: Tensor) -> float:
    """Root mean square difference over the reference's standard deviation."""
    return float((logits - reference).square().mean().sqrt() / reference.std())


def _dtype_that_fits(plan: Plan) -> torch.dtype:
    """float32 where one model at a time fits in memory, else the checkpoint's own dtype."""
    fits = plan.check_bytes(torch.float32) < free_memory(plan.device)
    return torch.float32 if fits else plan.dtype


@contextmanager
def _all_experts_on(model: Any, plan: Plan) -> Iterator[None]:
    """Select every expert, each with weight 1, for the time of the context."""
    blocks = moe_blocks(model)
    for block in blocks:
        block.router.top_k = plan.geometry.num_experts
        block.experts.down_proj.data.mul_(plan.gains.all_on)
    yield
    for block in blocks:
        block.router.top_k = plan.geometry.top_k
        block.experts.down_proj.data.div_(plan.gains.all_on)


def _check_weights(plan: Plan, weights: list[float]) -> None:
    """With its gain, each selected expert must count once in a sum, and all once in a mean."""
    geometry = plan.geometry
    expected = geometry.top_k if plan.combine == "sum" else geometry.granularity
    worst = max(weights, key=lambda weight: abs(weight * plan.gains.routed - expected))
    if abs(worst * plan.gains.routed / expected - 1) > WEIGHT_TOLERANCE:
        raise CheckFailed(
            f"the selected experts count {worst * plan.gains.routed:.4g} times instead of "
            f"{expected}: the router's weights and the gain in down_proj do not fit"
        )
