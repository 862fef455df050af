"""One step of training: the losses of a batch, their gradients, and what the routers did."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from upcycle.core.rng import draw_seed, generator
from upcycle.finetune import losses
from upcycle.finetune.checks import check_effect, check_finite, check_router_gradient
from upcycle.finetune.data import Data, batch_rows
from upcycle.finetune.gating.base import Pass
from upcycle.finetune.router_terms import Means
from upcycle.finetune.routers import update_bias
from upcycle.finetune.schedule import learning_rate
from upcycle.finetune.setup import Row, Setup

OTHERS = "others"
"""Losses that are means over all tokens of the text."""


def take_step(setup: Setup, step: int) -> Row:
    """One optimizer step over a batch that all processes share; its line of the log.

    Args:
        step: how many were taken before.

    Raises:
        Diverged: a loss or the gradient is no number; the weights are as they were.
    """
    settings, accelerator = setup.settings, setup.accelerator
    batches = _micro_batches(setup, step)
    counts = [torch.zeros(block.num_experts, device=accelerator.device) for block in setup.blocks]
    row = _gradients(setup, step, batches, counts)
    if step == 0:
        check_router_gradient(setup)
    row["grad_norm"] = float(accelerator.clip_grad_norm_(setup.model.parameters(), settings.clip))
    row = _reduced(setup, row)
    check_finite(setup, row, step + 1)
    for group in setup.optimizer.param_groups:
        group["lr"] = group["base_lr"] * learning_rate(settings, step, group["part"])
    setup.optimizer.step()
    setup.optimizer.zero_grad()
    row["lr"] = settings.rate * learning_rate(settings, step, "other")
    row["tokens"] = _counted(*batches)[OTHERS]
    return {"step": step + 1} | row | _balance(setup, counts)


def _gradients(setup: Setup, step: int, batches: list[Data], counts: list[Tensor]) -> Row:
    """This process's part of the gradients of a batch, and its losses.

    Args:
        counts: per block [E], to which each expert's selections are added.
    """
    settings, accelerator = setup.settings, setup.accelerator
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    whole, row = _counted(*batches), Row()
    # Of dropout, where a model has it.
    torch.manual_seed(
        draw_seed(generator(settings.seed, f"step {accelerator.process_index}", step))
    )
    means = None
    if setup.router_terms.of_steps and len(batches) > 1:
        means = _means_of_step(setup, step, mine, whole)
    weights = settings.loss_weights(step) | setup.router_terms.weights
    for number, batch in enumerate(mine, 1):
        last = number == len(mine)
        with nullcontext() if last else accelerator.no_sync(setup.model):
            _begin_pass(setup, step, number)
            terms = dict(_terms(setup, step, batch, counts, means))
            if step == 0 and number == 1:
                check_effect(setup, terms)
            # Processes' gradients are averaged: the mean over all tokens, however they are dealt.
            parts = {
                name: accelerator.num_processes * _share(batch, whole, name) * term
                for name, term in terms.items()
            }
            loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
            accelerator.backward(loss)
        for name, value in {"loss": loss, **parts}.items():
            row[name] = row.get(name, 0.0) + float(value.detach())
    return row


def _counted(*batches: Data) -> dict[str, int]:
    """The tokens that losses are means over."""
    return {
        "next_token": sum(batch.scored for batch in batches),
        "distill": sum(int(batch.foretelling_BL.sum()) for batch in batches),
        OTHERS: sum(int(batch.mask_BL.sum()) for batch in batches),
    }


def _share(batch: Data, whole: dict[str, int], loss: str = OTHERS) -> float:
    """What of a step's tokens that a loss is a mean over a micro-batch holds."""
    loss = loss if loss in whole else OTHERS
    return _counted(batch)[loss] / whole[loss]


def _begin_pass(setup: Setup, step: int, number: int) -> None:
    """Tell the gating what passes through the model next: this process's micro-batch of that
    number, counted from 1."""
    if setup.gater is not None:
        settings, accelerator = setup.settings, setup.accelerator
        place = accelerator.process_index + (number - 1) * accelerator.num_processes
        rows = range(place * settings.micro_batch, (place + 1) * settings.micro_batch)
        setup.gater.now = pass_of(setup, step, rows)


def pass_of(setup: Setup, step: int, rows: Sequence[int] = ()) -> Pass:
    """A pass of a step's sequences."""
    return Pass(setup.settings.seed, step, step / setup.settings.total_steps, rows)


@torch.no_grad()
def _means_of_step(setup: Setup, step: int, mine: list[Data], whole: dict[str, int]) -> Means:
    """What router losses are functions of, over the whole step, by a pass of its own: every part
    must know it before the first gradient."""
    parts = []
    for number, batch in enumerate(mine, 1):
        _begin_pass(setup, step, number)
        with setup.tap.recording(), setup.accelerator.autocast():
            tokens_BL = batch.tokens_BL.to(setup.accelerator.device)
            setup.model(input_ids=tokens_BL, use_cache=False)
        means = setup.router_terms.means(setup.router_terms.seen(setup.tap.routed, batch, step))
        parts.append((_share(batch, whole), means))
    return {
        name: [
            setup.accelerator.reduce(
                sum(share * means[name][place] for share, means in parts), "sum"
            )
            for place in range(len(setup.blocks))
        ]
        for name in parts[0][1]
    }


def count(setup: Setup, mask_T: Tensor, counts: list[Tensor]) -> None:
    """Add what the last pass selected to the counts."""
    for count_E, routed in zip(counts, setup.tap.routed, strict=True):
        count_E += routed.chosen_TK[mask_T].flatten().bincount(minlength=len(count_E))


def _micro_batches(setup: Setup, step: int) -> list[Data]:
    settings = setup.settings
    rows = batch_rows(len(setup.train), settings.batch_size, step, settings.seed)
    return [setup.train.take(part) for part in rows.split(settings.micro_batch)]


def _terms(
    setup: Setup, step: int, batch: Data, counts: list[Tensor], means: Means | None
) -> Iterator[tuple[str, Tensor]]:
    """The losses of a micro-batch that count, each unweighted, by name; its selections are added to
    the step's counts.

    Args:
        means: what router losses are functions of, over the whole step; None if this is all of it.
    """
    settings, device, teacher = setup.settings, setup.accelerator.device, setup.teacher
    tokens_BL, mask_BL = batch.tokens_BL.to(device), batch.mask_BL.to(device)
    mask_T = mask_BL.flatten()
    match = settings.loss_weights(step)["match_layers"] > 0
    arguments = {"input_ids": tokens_BL, "use_cache": False, "output_hidden_states": match}
    expected = None
    if teacher is not None and teacher.model is not None and (settings.distill or match):
        with torch.no_grad(), setup.accelerator.autocast():
            expected = teacher.model(**arguments)
    # Of itself, accelerate rounds in all models but sharded ones.
    watching = nullcontext() if setup.activations is None else setup.activations.recording()
    with setup.tap.recording(), watching, setup.accelerator.autocast():
        out = setup.model(**arguments)
    count(setup, mask_T, counts)
    if settings.next_token:
        scored_BL = batch.scored_BL.to(device)
        yield "next_token", losses.next_token_loss(out.logits, tokens_BL, scored_BL)
    yield from _from_teacher(setup, batch, out, expected)
    if setup.activations is not None:
        yield "hoyer", losses.square_hoyer_loss(setup.activations.outputs, mask_BL)
    seen = setup.router_terms.seen(setup.tap.routed, batch, step)
    yield from setup.router_terms.losses(seen, means)


def _from_teacher(
    setup: Setup, batch: Data, out: Any, expected: Any
) -> Iterator[tuple[str, Tensor]]:
    """What the model's outputs are held to, by the teacher's, if it was run, or by what was
    stored of its predictions."""
    settings, device = setup.settings, setup.accelerator.device
    foretelling_BL, temperature = batch.foretelling_BL.to(device), settings.distill_temperature
    if setup.teacher is not None and setup.teacher.train is not None:
        kept = setup.teacher.train.kept(batch.place_B, device)
        loss = losses.kept_distillation_loss(out.logits[foretelling_BL], kept, temperature)
        yield "distill", loss
    elif settings.distill:
        args = out.logits, expected.logits, foretelling_BL
        yield "distill", losses.distillation_loss(*args, temperature)
    if out.hidden_states is not None:
        hidden = out.hidden_states[1:], expected.hidden_states[1:]
        yield "match_layers", losses.layer_match_loss(*hidden, batch.mask_BL.to(device))


def _balance(setup: Setup, counts: list[Tensor]) -> Row:
    """How evenly the experts were used in a step, with the selection biases moved accordingly; of
    a dense model nothing."""
    if not counts:
        return {}
    counts = [setup.accelerator.reduce(count_E, "sum") for count_E in counts]
    setup.router_terms.adapt(counts)
    if setup.settings.balance_bias:
        for block, scale, count_E in zip(setup.blocks, setup.scales, counts, strict=True):
            update_bias(block, count_E, setup.settings.balance_bias * scale.bias)
    return {
        "imbalance": sum(float(c.max() / c.mean()) for c in counts) / max(1, len(counts)),
        "dead": sum(int((count_E == 0).sum()) for count_E in counts),
    }


def _reduced(setup: Setup, row: Row) -> Row:
    """The row with its losses averaged over processes."""
    if setup.accelerator.num_processes == 1:
        return row
    names = [name for name in row if name != "grad_norm"]
    values = torch.tensor([row[name] for name in names], device=setup.accelerator.device)
    means = setup.accelerator.reduce(values, "mean").tolist()
    return row | dict(zip(names, means, strict=True))
