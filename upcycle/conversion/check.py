"""The check: re-open the finished checkpoint with plain transformers, compare it with the source.

First exactness, which a correct conversion has: copies give the dense model's logits, and a split
with all its experts on and equally weighted does too. Then routing: the experts count what was
planned. Then what the conversion did to the model, on several kinds of text that no method has
seen, each by itself: a model may be fine on the kind that it was fitted on and broken on another.
That is measured by predictions of the next token; of an encoder, which makes none, by its last
hidden states. An encoder-decoder predicts the second half of what the encoder sees the first of.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle.conversion.plan import Plan
from upcycle.core.errors import CheckFailed
from upcycle.core.machine import free_memory
from upcycle.core.progress import Progress
from upcycle.core.types import DenseFFN
from upcycle.evaluation.comparing import Comparison, compare, decode_windows
from upcycle.evaluation.hidden import HiddenComparison, compare_hidden, hidden_result, put_out
from upcycle.evaluation.result import TOLERANCE, load_result, relative_error
from upcycle.evaluation.routing import utilisation
from upcycle.models.blocks import moe_blocks, watch_selections
from upcycle.models.head import drop_layers
from upcycle.models.loading import load_model
from upcycle.models.record.check import CheckReport, EncoderReport, KindResult, Report
from upcycle.models.stream import replace_ffn

EXACT_TOKENS = 128

LOW_PRECISION_TOLERANCE = 0.1
"""As TOLERANCE: weights below float32 round their gains."""
WEIGHT_TOLERANCE = 0.02
SAME_SELECTION = 0.8  # of the tokens; bfloat16 changes some that are close


def run_check(
    plan: Plan,
    folder: Path,
    held: Mapping[str, Tensor],
    progress: Progress,
    all_on: Iterable[tuple[int, DenseFFN]] = (),
) -> Report:
    """Compare the checkpoint in `folder` with the plan's source.

    Args:
        held: by the kind of text, windows [W, L].
        all_on: the layers of which all experts together are no longer the source's FFN, and the
            FFN that they come to. Exactness is measured against the dense model with these in
            place, the rest against the dense model as it is.

    Raises:
        CheckFailed: the checkpoint does not load whole, or is not exact where it must be.
    """
    dtype = dtype_that_fits(plan)
    step = _steps(progress, 2 * sum(map(len, held.values())))
    exact_L = next(iter(held.values()))[0, :EXACT_TOKENS]
    model = load_model(plan.source.folder, dtype, plan.device)
    dense = {kind: decode_windows(model, windows_WL, step) for kind, windows_WL in held.items()}
    for layer, ffn in all_on:
        replace_ffn(model, layer, ffn)
    exact = put_out(model, exact_L)
    drop_layers(model)
    model = load_result(folder, dtype, plan.device)
    low_precision = plan.design.dtype != torch.float32 or dtype != torch.float32
    tolerance = LOW_PRECISION_TOLERANCE if low_precision else TOLERANCE
    exact_error = _exact_error(plan, model, exact_L, exact)
    if exact_error is not None and not exact_error <= tolerance:
        raise CheckFailed(
            "the finished checkpoint is not the dense model's equal: its "
            f"{plan.source.arch.output} differ by {exact_error:.2g} of their spread (at most "
            f"{tolerance:g} is rounding)"
        )
    _check_routing(plan, model, exact_L)
    found: dict[str, Any] = {"exact_error": exact_error, "exact_tolerance": tolerance}
    found["window"] = max(windows_WL.shape[1] for windows_WL in held.values())
    if plan.source.arch.encoder:
        far = {k: compare_hidden(model, held[k], dense[k], step) for k in held}
        kinds = [hidden_result(kind, held[kind].numel(), c) for kind, c in far.items()]
        return EncoderReport(**found, kinds=kinds, left_out=[], load=_load(list(far.values())))
    compared = {
        kind: compare(model, windows_WL, dense[kind], step) for kind, windows_WL in held.items()
    }
    return CheckReport(
        **found,
        kinds=[_kind(kind, held[kind].numel(), c) for kind, c in compared.items()],
        left_out=[] if "self" in held else ["self"],
        load=_load(list(compared.values())),
    )


def _load(compared: Sequence[Comparison | HiddenComparison]) -> list[list[float]]:
    """Of every layer, over all kinds of text."""
    pairs = zip(*(c.pairs for c in compared), strict=True)
    return [utilisation(sum(layer).diagonal()) for layer in pairs]


def _kind(kind: str, tokens: int, compared: Comparison) -> KindResult:
    ratio = compared.perplexity / compared.perplexity_against
    return KindResult(
        kind=kind,
        tokens=tokens,
        perplexity_dense=compared.perplexity_against,
        perplexity_moe=compared.perplexity,
        # What is no number is the worst.
        ratio=math.inf if math.isnan(ratio) else ratio,
        worst_window=compared.worst_window_ratio,
        kl=compared.kl,
        top1_agreement=compared.top1_agreement,
    )


def _steps(progress: Progress, total: int) -> Callable[[int], None]:
    """Tells `progress` of every window of all kinds and both models."""
    windows = itertools.count(1)
    return lambda _: progress("checking", next(windows), total)


def _exact_error(plan: Plan, model: Any, exact_L: Tensor, exact: Tensor) -> float | None:
    """How far what the model puts out is from what the dense one does; None where they need not be
    equal."""
    if plan.exact == "logits":
        return relative_error(put_out(model, exact_L), exact)
    if plan.exact == "all on":
        with _all_experts_on(model, plan):
            return relative_error(put_out(model, exact_L), exact)
    return None


def dtype_that_fits(plan: Plan) -> torch.dtype:
    """float32 where one model at a time fits in memory, else the checkpoint's own dtype."""
    fits = plan.check_bytes(torch.float32) < free_memory(plan.device)
    return torch.float32 if fits else plan.design.dtype


@contextmanager
def _all_experts_on(model: Any, plan: Plan) -> Iterator[None]:
    """Every expert of every layer, each with weight 1, for the time of the context."""
    with ExitStack() as stack:
        for block in moe_blocks(model):
            stack.enter_context(block.all_on(plan.design.gains.all_on))
        yield


@torch.no_grad()
def _check_routing(plan: Plan, model: Any, window_L: Tensor) -> None:
    """The experts that the router selects, and what they count, are those that were planned.

    Raises:
        CheckFailed: experts that are all alike would not count 1, or a layer's weights are not what
            its logits make of them.
    """
    design = plan.design
    wanted = design.geometry.granularity if plan.way.averages else design.geometry.top_k
    counted = float(design.weigh(torch.zeros(1, design.geometry.num_experts)).sum())
    if abs(counted - wanted) > TOLERANCE * wanted:
        raise CheckFailed(f"the selected experts count {counted:.3g} times instead of {wanted}")
    blocks = moe_blocks(model)
    seen: list[tuple[Tensor, Tensor]] = [(window_L, window_L)] * len(blocks)
    inputs: list[Tensor] = [window_L] * len(blocks)

    def keep_input(place: int) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            inputs[place] = args[0].flatten(0, -2)

        return hook

    def see(place: int, chosen_TK: Tensor, weights_TK: Tensor) -> None:
        seen[place] = chosen_TK, weights_TK

    hooks = [b.router.register_forward_pre_hook(keep_input(i)) for i, b in enumerate(blocks)]
    with watch_selections(blocks, see):
        put_out(model, window_L)
    for hook in hooks:
        hook.remove()
    for block, x_TD, (chosen_TK, weights_TK) in zip(blocks, inputs, seen, strict=True):
        expected_TE = design.weigh(x_TD.float() @ block.router.weight.float().T)
        routed = design.gains.routed * block.factor * weights_TK.float()
        found_TE = torch.zeros_like(expected_TE).scatter_(1, chosen_TK, routed)
        # Experts at the margin may change places by rounding; the planned ones hardly differ then.
        error = float((found_TE.sort(1).values - expected_TE.sort(1).values).abs().mean(0).max())
        same = float(((found_TE > 0) == (expected_TE > 0)).all(1).float().mean())
        if error > WEIGHT_TOLERANCE * float(expected_TE.max()) or same < SAME_SELECTION:
            raise CheckFailed(
                f"the router of layer {block.layer} does not select and weight experts as planned: "
                f"weights differ by {error:.2g}, {100 * same:.0f} % of the selections are the same"
            )
