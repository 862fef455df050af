"""Which layers to keep dense: the best of a few choices, each tried on a few tokens.

Damage (`damage.py`) says which layers suffer most, each by itself, and so which choices are worth a
trial. What a choice is worth is not said by damage: the other layers pay for it with their active
share, and errors add up on their way. So each is carried out, layer by layer and by the methods of
the request, on a few of the calibration tokens, and measured on others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import exp
from typing import Protocol

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from upcycle.conversion.damage import measure_damage
from upcycle.conversion.geometry import moe_share
from upcycle.conversion.layer import convert_layer
from upcycle.conversion.plan import Plan
from upcycle.conversion.planning import make_plan
from upcycle.core.errors import UpcycleError
from upcycle.core.progress import Progress
from upcycle.core.types import LayerActivations, LossGradient
from upcycle.models.assemble import dense_ffn
from upcycle.models.record.conversion import DenseLayers, Trial
from upcycle.models.stream import PREDICTED_TOKENS, HiddenStream
from upcycle.models.targets import TARGETS
from upcycle.models.text import texts

FIT_TOKENS, HELD_TOKENS, DAMAGE_TOKENS = 2048, 1024, 256
"""Of the calibration tokens, to fit a trial on, to measure it on, and to measure damage on."""
DAMAGE_LENGTH = 64  # tokens of a sequence on which damage is measured
DAMAGE_EXPONENT = 1.6
"""Perplexity's logarithm grows like the share that is off to this power (measured on one model: it
only proposes what to try)."""
GAIN = 1.02
"""By so much a dense layer must better the worst text, where the other layers can't pay for it;
and a choice the mean, to be preferred to one with fewer dense layers."""
FEW, ONE_IN = 2, 10
"""Dense layers for which the others don't pay: at most two, or one in ten."""


class Gradients(Protocol):
    """The loss's, of a layer and some of the calibration sequences; nothing where no method looks
    at it."""

    def __call__(self, layer: int, rows: Tensor) -> LossGradient | None: ...


@dataclass(frozen=True)
class Sample:
    """Calibration sequences to try choices on."""

    fit_BL: Tensor
    held_BL: Tensor
    names: tuple[str, ...]
    """The text of each row that is held."""
    loss: Callable[[int], LossGradient | None] = lambda layer: None
    """The loss's gradient in a layer, of the sequences to fit on."""


def choose_dense_layers(
    plan: Plan,
    fit_BL: Tensor,
    front: tuple[int, ...],
    gradients: Gradients,
    progress: Progress,
) -> DenseLayers:
    """The best of a few choices.

    Args:
        plan: with no layer dense.
        fit_BL: calibration tokens, of whose texts each gives a sequence in turn.
        front: what begins each sequence.
    """
    sample = _sample(fit_BL, texts(plan.recipe.calibration), gradients)
    damage = measure_damage(plan, _cut(sample.held_BL, len(front)), progress)
    dense = _losses(_stream_dense(plan, sample.held_BL), plan, len(sample.held_BL))
    trials: list[Trial] = []

    def attempt(places: tuple[int, ...]) -> Trial | None:
        layers = tuple(plan.source.arch.ffn_layers[place] for place in places)
        known = next((trial for trial in trials if trial.layers == layers), None)
        if known is not None:
            return known
        progress("trying dense layers", len(trials), len(trials) + 1)
        try:
            trial = try_layers(plan, layers, sample, dense)
        except UpcycleError:  # the other layers can't pay for so many
            return None
        trials.append(trial)
        return trial

    if attempt(()) is None:  # the conversion itself will say why
        return DenseLayers((), _of_all(plan, damage), trials)
    best = (
        _most_worth(plan, damage, attempt)
        if plan.request.top_k is None
        else _few(plan, damage, attempt)
    )
    progress("trying dense layers", len(trials), len(trials))
    return DenseLayers(best.layers, _of_all(plan, damage), trials)


Attempt = Callable[[tuple[int, ...]], Trial | None]
"""Of places among the layers that have an FFN."""


def _of_all(plan: Plan, damage: list[float]) -> list[float]:
    """Damage per layer of the model, of which only those with an FFN take any."""
    arch = plan.source.arch
    known = dict(zip(arch.ffn_layers, damage, strict=True))
    return [known.get(layer, 0.0) for layer in range(arch.num_layers)]


def _most_worth(plan: Plan, damage: list[float], attempt: Attempt) -> Trial:
    """Of no dense layer, the first and the last, and those that damage proposes, what loses least
    at the same active share."""
    kind = TARGETS[plan.target].dense_layers
    most = len(plan.geometries()) - 1
    proposed = best_dense_layers(damage, plan.active_ffn_ratio, kind, most)
    best, *others = _tried({(), _ends(kind, len(damage)), proposed}, attempt)
    for trial in others:
        if trial.mean * GAIN < best.mean:
            best = trial
    return best


def _few(plan: Plan, damage: list[float], attempt: Attempt) -> Trial:
    """If nobody pays for them: of no dense layer, the first and the last, and as many as may be
    dense, what is best for the worst text, which each must better.

    With the first and the last among those many, if there is room for others: together these two
    are worth more than damage, which is each layer's alone, says of them.
    """
    kind = TARGETS[plan.target].dense_layers
    ends = _ends(kind, len(damage))
    many = max(FEW, len(damage) // ONE_IN)
    first = ends if many > FEW else ()
    order = _by_damage(damage, kind, first)
    best, *others = _tried({(), ends, tuple(sorted(order[:many]))}, attempt)
    for trial in others:
        if trial.worst * GAIN ** (len(trial.layers) - len(best.layers)) < best.worst:
            best = trial
    return best


def _tried(choices: set[tuple[int, ...]], attempt: Attempt) -> list[Trial]:
    """Trials of the choices that can be carried out, the fewest dense layers first."""
    ordered = sorted(choices, key=lambda layers: (len(layers), layers))
    return [trial for trial in map(attempt, ordered) if trial is not None]


def _ends(kind: str, layers: int) -> tuple[int, ...]:
    """The first layer and the last, of those that a target can keep dense."""
    return (0,) if kind == "prefix" else tuple(sorted({0, layers - 1}))


def _by_damage(damage: list[float], kind: str, first: tuple[int, ...] = ()) -> list[int]:
    """Layers in the order in which they become dense: after these, the most damaged."""
    layers = list(range(len(damage)))
    if kind == "prefix":
        return layers
    if kind == "ends":
        return _from_the_ends(layers, damage, first)
    return sorted(layers, key=lambda i: (i not in first, -damage[i]))


def _from_the_ends(layers: list[int], damage: list[float], first: tuple[int, ...]) -> list[int]:
    """Layers, the more damaged of the outermost two before the other; before that, these."""
    order = list(first)
    rest = [layer for layer in layers if layer not in first]
    while rest:
        order.append(rest.pop(0 if damage[rest[0]] >= damage[rest[-1]] else -1))
    return order


def best_dense_layers(
    damage: list[float], active: float, kind: str, most: int | None = None
) -> tuple[int, ...]:
    """The layers without which the damage is least, if the others must get by with fewer neurons
    so that the active share stays the same.

    Args:
        damage: per layer, when this layer alone is cut to the active share.
        kind: which layers a target can keep dense (see `MoETarget`).
        most: how many layers can stay dense and leave the others experts to route; by default
            all but one.
    """
    if active >= 1 or kind == "none":
        return ()
    order = _by_damage(damage, kind)
    best, least = 0, sum(damage)
    for count in range(len(damage) if most is None else min(len(damage), most + 1)):
        share = moe_share(active, len(damage), count)
        if share <= 0:
            break
        growth = ((1 - share) / (1 - active)) ** DAMAGE_EXPONENT
        total = growth * sum(damage[i] for i in order[count:])
        if total < least:
            best, least = count, total
    return tuple(sorted(order[:best]))


def try_layers(
    plan: Plan, layers: tuple[int, ...], sample: Sample, dense_losses: list[float]
) -> Trial:
    """Convert with these layers dense, in memory, and measure what it did to the held sequences.

    Raises:
        UpcycleError: the request can't be carried out with these layers dense.
    """
    decided = {"keep_dense": layers, "target": plan.target, "calibration": plan.recipe.calibration}
    plan = make_plan(plan.source, plan.request.model_copy(update=decided))
    losses = _losses(_stream_converted(plan, sample), plan, len(sample.held_BL))
    ratios = {}
    for name in dict.fromkeys(sample.names):
        rows = [i for i, row in enumerate(sample.names) if row == name]
        ratios[name] = exp(sum(losses[i] - dense_losses[i] for i in rows) / len(rows))
    return Trial(layers, ratios)


def _sample(fit_BL: Tensor, names: list[str], gradients: Gradients) -> Sample:
    """Sequences of every text, from all over it: to fit on, and in between others to measure on."""
    seq_len, count = fit_BL.shape[1], min(len(names), len(fit_BL))
    fit, held = (max(1, tokens // seq_len // count) for tokens in (FIT_TOKENS, HELD_TOKENS))
    rows: dict[bool, list[int]] = {True: [], False: []}
    named = []
    for place in range(count):
        own = range(place, len(fit_BL), count)
        chosen = torch.linspace(0, len(own) - 1, min(fit + held, len(own))).round().long()
        kept = set(torch.linspace(0, len(chosen) - 1, min(held, len(chosen))).round().tolist())
        for number, row in enumerate(chosen):
            rows[number in kept].append(own[row])
        named += [names[place]] * len(kept)
    fitted = torch.tensor(rows[False] or rows[True])  # the same, of very little text
    loss = partial(gradients, rows=fitted)
    return Sample(fit_BL[fitted], fit_BL[rows[True]], tuple(named), loss)


def _cut(tokens_BL: Tensor, front: int) -> Tensor:
    """Short pieces, evenly from all sequences: what a layer does differs between texts.

    Args:
        front: how many tokens begin a sequence, and then each of its pieces.
    """
    front_BF, body_BT = tokens_BL[:, :front], tokens_BL[:, front:]
    length = min(DAMAGE_LENGTH, tokens_BL.shape[1])
    part = length - front
    count = body_BT.shape[1] // part
    pieces_BT = body_BT[:, : count * part].reshape(-1, part)
    pieces_BL = torch.cat([front_BF.repeat_interleave(count, 0), pieces_BT], 1)
    wanted = max(1, min(DAMAGE_TOKENS // length, len(pieces_BL)))
    return pieces_BL[torch.linspace(0, len(pieces_BL) - 1, wanted).round().long()]


@torch.no_grad()
def _stream_dense(plan: Plan, tokens_BL: Tensor) -> HiddenStream:
    source, stream = plan.source, _embedded(plan, tokens_BL)
    for layer in range(source.arch.num_layers):
        stream.through(layer, source.read_layer(layer))
    return stream


@torch.no_grad()
def _stream_converted(plan: Plan, sample: Sample) -> HiddenStream:
    """The sample's tokens through the layers, each converted on those to fit on."""
    source, act = plan.source, ACT2FN[plan.source.arch.fields["hidden_act"]]
    stream = _embedded(plan, torch.cat([sample.fit_BL, sample.held_BL]))
    fitted = sample.fit_BL.numel()
    for layer in range(source.arch.num_layers):
        raw = source.read_layer(layer)
        if layer not in plan.moe_layers:
            stream.through(layer, raw)
            continue
        x_TD, norm_T = stream.attend(layer, raw)
        ffn = dense_ffn(source.canonical(raw), act)
        wide = ffn.to(x_TD.device, torch.float32)
        x_TD = x_TD.float()
        activations = LayerActivations(wide, x_TD[:fitted], loss=sample.loss(layer))
        converted = convert_layer(plan, layer, ffn, activations, norm_T[:fitted])
        stream.advance(layer, converted.output(LayerActivations(wide, x_TD), plan.design.weigh))
    return stream


def _embedded(plan: Plan, tokens_BL: Tensor) -> HiddenStream:
    """A stream before the first layer. (A function of its own, so that the embeddings are gone.)"""
    source = plan.source
    return HiddenStream(
        source.config, source.read(source.embedding_names()), tokens_BL, plan.device
    )


def _losses(stream: HiddenStream, plan: Plan, rows: int) -> list[float]:
    """The mean loss of each of the last rows, at the end of a stream."""
    outer = plan.source.read(plan.source.outer_names())
    next_T = stream.groups[-1][-rows:].roll(-1, 1).flatten().to(plan.device)
    nats = [
        -log_probs_tV.gather(1, next_t[:, None])[:, 0]
        for log_probs_tV, next_t in zip(
            stream.last_log_probs(outer, len(next_T)), next_T.split(PREDICTED_TOKENS), strict=True
        )
    ]
    # Nothing comes after a row's last token.
    means: list[float] = torch.cat(nats).view(rows, -1)[:, :-1].mean(1).tolist()
    return means
