"""The check: re-open the finished checkpoint with plain transformers, compare it with the source.

First exactness, which a correct conversion has: copies give the dense model's logits, and a split
with all its experts on does too. Then what the conversion did to the model, on text that no method
has seen: perplexity, divergence, agreement, and how tokens spread over experts.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from upcycle.errors import CheckFailed, UpcycleError
from upcycle.planning import Plan

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


def run_check(plan: Plan, folder: Path, tokens_BL: Tensor, progress: Any) -> CheckReport:
    """Compare the checkpoint in `folder` with the plan's source on `tokens_BL`.

    Raises:
        CheckFailed: the checkpoint does not load whole, or is not exact where it must be.
        UpcycleError: there is not enough memory for one of the models.
    """
    dtype = _dtype_that_fits(plan)
    total = 2 * len(tokens_BL)
    dense = _load(plan.source.folder, dtype, plan.device)
    exact_tokens_1L = tokens_BL[:1, :EXACT_TOKENS].to(plan.device)
    exact_dense = _logits(dense, exact_tokens_1L)
    dense_outputs, dense_loss = [], 0.0
    for i, window_L in enumerate(tokens_BL):
        progress("checking", i, total)
        log_probs_LV = _logits(dense, window_L[None].to(plan.device)).log_softmax(-1)
        dense_loss += _loss(log_probs_LV, window_L)
        # float16 halves the memory, but makes ties: the most likely tokens are kept apart.
        dense_outputs.append((log_probs_LV.to("cpu", torch.float16), log_probs_LV.argmax(-1)))
    del dense

    moe = _load(folder, dtype, plan.device)
    exact_error = None
    if plan.recipe.method.name in ("split", "copy"):
        with _all_experts_on(moe, plan) if plan.recipe.method.name == "split" else _nothing():
            exact_error = relative_error(_logits(moe, exact_tokens_1L), exact_dense)
    tolerance = TOLERANCE[plan.combine]
    if plan.dtype != torch.float32 or dtype != torch.float32:
        tolerance = LOW_PRECISION_TOLERANCE
    if exact_error is not None and not exact_error <= tolerance:
        raise CheckFailed(
            f"the finished checkpoint is not the dense model's equal: its logits differ by "
            f"{exact_error:.2g} of their spread (at most {tolerance:g} is rounding)"
        )
    moe_loss = kl = agreement = 0.0
    with _watch_routers(moe) as (counts, weights):
        pairs = zip(tokens_BL, dense_outputs, strict=True)
        for i, (window_L, (stored_LV, top_L)) in enumerate(pairs):
            progress("checking", len(tokens_BL) + i, total)
            log_probs_LV = _logits(moe, window_L[None].to(plan.device)).log_softmax(-1)
            moe_loss += _loss(log_probs_LV, window_L)
            reference_LV = stored_LV.to(plan.device).float().log_softmax(-1)
            gap_LV = reference_LV.exp() * (reference_LV - log_probs_LV)
            kl += gap_LV.sum(-1).mean().item()
            agreement += (log_probs_LV.argmax(-1) == top_L).float().mean().item()
    progress("checking", total, total)
    _check_weights(plan, weights)
    windows = len(tokens_BL)
    return CheckReport(
        exact_error=exact_error,
        exact_tolerance=tolerance,
        perplexity_dense=float(torch.tensor(dense_loss / windows).exp()),
        perplexity_moe=float(torch.tensor(moe_loss / windows).exp()),
        kl=kl / windows,
        top1_agreement=agreement / windows,
        tokens=tokens_BL.numel(),
        window=tokens_BL.shape[1],
        load=[_utilisation(count_E) for count_E in counts],
    )


def relative_error(logits: Tensor, reference: Tensor) -> float:
    """Root mean square difference over the reference's standard deviation."""
    return float((logits - reference).square().mean().sqrt() / reference.std())


def _dtype_that_fits(plan: Plan) -> torch.dtype:
    """float32 where one model at a time fits in memory, else the checkpoint's own dtype."""
    if plan.device.type == "cpu":
        free = psutil.virtual_memory().available
    else:
        free = torch.cuda.mem_get_info(plan.device)[0]
    for dtype in (torch.float32, plan.dtype):
        needed = plan.check_bytes() + plan.params_total * (dtype.itemsize - plan.dtype.itemsize)
        if needed < free:
            return dtype
    raise UpcycleError(
        f"the check holds the finished model, {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB of "
        "memory are free: pass --check none and evaluate where it fits"
    )


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    with warnings.catch_warnings():
        # A target that always has a shared expert holds one of no neurons.
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True
            )
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise CheckFailed(f"{folder} does not load in transformers: {reason}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise CheckFailed(f"{folder} does not load whole: {kind} {sorted(info[kind])[:3]}")
    return model.to(device).eval()


@torch.no_grad()
def _logits(model: Any, tokens_1L: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens_1L, use_cache=False).logits[0].float()
    return logits


def _loss(log_probs_LV: Tensor, window_L: Tensor) -> float:
    """Mean negative log-likelihood of a window's tokens, the first one given."""
    targets = window_L[1:, None].to(log_probs_LV.device)
    return float(-log_probs_LV[:-1].gather(1, targets).mean())


def routers(model: nn.Module) -> list[Any]:
    """The routers of any of the targets, layer by layer."""
    return [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _all_experts_on(model: Any, plan: Plan) -> Iterator[None]:
    """Select every expert, each with weight 1, for the time of the context."""
    experts = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
    for router in routers(model):
        router.top_k = plan.geometry.routed_experts
    for module in experts:
        module.down_proj.data.mul_(plan.gains.all_on)
    yield
    for router in routers(model):
        router.top_k = plan.geometry.top_k
    for module in experts:
        module.down_proj.data.div_(plan.gains.all_on)


@contextmanager
def _watch_routers(model: Any) -> Iterator[tuple[list[Tensor], list[float]]]:
    """Per MoE layer, how often each expert is selected [E]; and per call of a router, the mean
    over tokens of the sum of the selected experts' weights."""
    counts: list[Tensor] = []
    weights: list[float] = []
    hooks = []
    for place, router in enumerate(routers(model)):
        counts.append(torch.zeros(router.weight.shape[0], dtype=torch.int64))

        def watch(_: nn.Module, __: Any, output: Any, place: int = place) -> None:
            _, weights_TK, chosen_TK = output
            counts[place] += chosen_TK.flatten().cpu().bincount(minlength=len(counts[place]))
            weights.append(weights_TK.float().sum(-1).mean().item())

        hooks.append(router.register_forward_hook(watch))
    yield counts, weights
    for hook in hooks:
        hook.remove()


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


def _utilisation(count_E: Tensor) -> list[float]:
    fair = count_E.sum() / len(count_E)
    return [round(float(n), 4) for n in count_E / fair]
