"""What stops a run: numbers that are none, and losses or routers that nothing moves."""

import math

import torch
from torch import Tensor

from upcycle.core.errors import Diverged, UpcycleError
from upcycle.core.flags import setting
from upcycle.finetune.schedule import learning_rate
from upcycle.finetune.setup import Setup


def check_finite(setup: Setup, measured: dict[str, float], step: int) -> None:
    """Stop at what is no number, before it gets into the weights or the log.

    Args:
        step: at which it was measured, counted from 1; 0 before all.

    Raises:
        Diverged: one of the values is not finite; of gradients, unless it is the loss scaler of
            float16, which lowers itself and skips the step.
    """
    scaler = setup.accelerator.scaler
    rescaled = scaler is not None and scaler.get_scale() > 1
    for name, value in measured.items():
        if math.isfinite(value) or (name == "grad_norm" and rescaled):
            continue
        if step == 0:
            raise Diverged(f"the {name} is {value:g} before the first step: the model is broken")
        rate = setup.settings.rate * learning_rate(setup.settings, step - 1, "other")
        raise Diverged(
            f"training stopped at step {step}: the {name.replace('_', ' ')} is {value:g} "
            f"(learning rate {rate:.3g} of `lr={setup.settings.rate:g}`, precision "
            f"{setup.accelerator.mixed_precision}): lower `lr`, or train in another `precision`"
        )


def check_effect(setup: Setup, terms: dict[str, Tensor]) -> None:
    """A router loss that moves nothing is a mistake, whoever made it; but where all experts are
    on for every token, as in a merge of two, there is nothing to balance."""
    if not setup.router_terms.weights:
        return
    # The last block's alone: from the others, the way leads through the blocks after them.
    routed, router = setup.tap.routed[-1], setup.blocks[-1].router
    all_on = routed.chosen_TK.shape[1] == routed.logits_TE.shape[1]
    moving = [each for each in (routed.logits_TE, router.weight) if each.requires_grad]
    for name, weight in setup.router_terms.weights.items():
        if not float(terms[name].detach()) or (name == "balance" and all_on):
            continue
        grads: tuple[Tensor | None, ...] = ()
        if moving and terms[name].requires_grad:
            grads = torch.autograd.grad(terms[name], moving, retain_graph=True, allow_unused=True)
        if not any(grad is not None and bool(grad.any()) for grad in grads):
            raise UpcycleError(
                f"{setting(setup.settings.field_of(name), weight)} has no effect on this model's "
                "routers: set it to 0, or train them (`train=moe`)"
            )


def check_router_gradient(setup: Setup) -> None:
    routers = [g for g in setup.optimizer.param_groups if g["part"] == "router"]
    grads = [p.grad for group in routers for p in group["params"] if p.grad is not None]
    if routers and (_fixed_weights(setup) or not any(float(grad.norm()) for grad in grads)):
        raise UpcycleError(
            "the routers get no gradient: with one expert per token and renormalised weights, the "
            f"weight is always 1; pass {setting('dense_router_gradient', True)} or `balance`, or "
            "`train=experts`"
        )


def _fixed_weights(setup: Setup) -> bool:
    """Whether the routers' weights do not depend on their logits, so that a gradient would be
    rounding; several alike, as those of a copy's shards, are not fixed."""
    settings = setup.settings
    if settings.dense_router_gradient or settings.train == "partition" or setup.router_terms.terms:
        return False
    return all(
        routed.weights_TK.shape[1] == 1
        and bool((routed.weights_TK == routed.weights_TK[0, 0]).all())
        and bool((routed.logits_TE != routed.logits_TE[0, 0]).any())
        for routed in setup.tap.routed
    )
