"""Prior-approximate: the router learns which experts put out most nearly what the FFN does.

FactorLLM, arXiv:2408.11855: by itself, expert e should put out its part of the FFN's output,
y k / E. The k experts that come nearest have target 1, the others 0; softmax makes these targets
probabilities, and the router's are drawn to them by cross entropy, beside a loss that keeps experts
equally busy. Split and weights stay as they are.

Departures: the released loss is the divergence of the router's probabilities from the target's,
where cross entropy has the gradient of the target's from the router's. The paper adds it to the
language model's loss, and trains the experts, too; its released loop leaves it out, so that its
router learns nothing. Here it is all that there is.
An expert that puts out all of y is as far from y / 2 as one that puts out nothing, so the layer's
error need not fall: what is learned is kept all the same.
"""

from pydantic import NonNegativeFloat
from torch import Tensor

from upcycle.conversion.fit.base import (
    Experts,
    FitParams,
    Lesson,
    Rate,
    fit,
    hard_top_k,
)
from upcycle.conversion.fit.loop import follow, unit_step
from upcycle.core.types import LayerActivations


class PriorApproximateParams(FitParams):
    rate: Rate = 0.7
    """Of the first steps, over the router's root mean square / √hidden."""
    balance: NonNegativeFloat = 0.2
    """Weight of the mean of softmax over all experts, where only those that are on count."""


@fit(
    "prior_approximate",
    learns=("router",),
    guarded=False,
    summary="the router learns which experts put out most nearly what the whole FFN does",
    paper="arXiv:2408.11855",
    params=PriorApproximateParams,
)
def learn(experts: Experts, lesson: Lesson, params: PriorApproximateParams) -> Experts:
    router_ED = experts.router_ED.clone()
    target_TE = nearest(lesson.activations, experts.experts_EM, lesson.top_k)

    def loss(batch: tuple[Tensor, ...]) -> Tensor:
        x_tD, _, _, target_tE = batch
        logits_tE = x_tD @ router_ED.T
        entropy = -(target_tE.softmax(1) * logits_tE.log_softmax(1)).sum(1).mean()
        busy_tE = hard_top_k(logits_tE.detach(), lesson.top_k) * logits_tE.softmax(1)
        return entropy + params.balance * busy_tE.mean()

    rates = [(router_ED, params.rate * unit_step(router_ED))]
    steps, batches = lesson.steps(params.epochs), lesson.batches(params.epochs, target_TE)
    follow(rates, batches, loss, steps, lesson.tell)
    return Experts(experts.ffn, experts.experts_EM, router_ED)


def nearest(activations: LayerActivations, experts_EM: Tensor, top_k: int) -> Tensor:
    """1 for the k experts whose output is nearest to the FFN's y k / E, [T, E], else 0."""
    down_DF, share = activations.ffn.down_DF, top_k / len(experts_EM)
    target_TE = activations.x_TD.new_zeros(len(activations.x_TD), len(experts_EM))
    for _, h_tF, room_tE in activations.chunks(target_TE):
        part_tD = share * h_tF @ down_DF.T
        error_tE = room_tE.clone()
        for e, own in enumerate(experts_EM):
            error_tE[:, e] = (h_tF[:, own] @ down_DF[:, own].T - part_tD).square().mean(1)
        room_tE.copy_(hard_top_k(-error_tE, top_k))
    return target_TE
