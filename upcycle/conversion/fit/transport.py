"""Transport: which neurons share an expert is learned, and who chooses them with it.

DOT-MoE, arXiv:2606.01666 (details from a re-implementation: there is no official code). Each neuron
has an affinity to each expert. Balanced transport makes a plan of them, in which a neuron's shares
add up to 1 and all experts hold equally many: Sinkhorn's algorithm in the log domain, at a
temperature that falls. Rounding it greedily gives a partition M, the largest shares first; the
router R takes the top k. The layer puts out (h * R Mᵀ) downᵀ, and affinities and router follow the
gradient of its error, straight through both roundings. The weights stay as they are.

Departures: affinities begin at noise and the router at what the recipe's router gives. The paper's
loss is that of the whole model, the re-implementation's the layer's mean squared error; here it is
that over the output's own, and tokens count as in a refit. The temperature falls by equal factors,
the re-implementation's by equal steps.
"""

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from upcycle.conversion.fit.base import (
    Experts,
    FitParams,
    Lesson,
    Rate,
    fit,
    hard_top_k,
    straight_through_top_k,
)
from upcycle.conversion.fit.loop import follow, unit_step
from upcycle.core.transport import partition, straight_through, transport

NOISE = 0.01  # standard deviation of the affinities at the start


class TransportParams(FitParams):
    epochs: PositiveInt = 5
    """Passes over the calibration tokens; five over 32,768 are the re-implementation's 300 steps.
    """
    rate: Rate = 3e-3
    """Of the affinities' first steps."""
    router_rate: Rate = 0.7
    """Of the router's, over its root mean square / √hidden."""
    iterations: PositiveInt = 50
    """Of Sinkhorn's algorithm."""
    hottest: PositiveFloat = 1.0
    """Temperature of the transport at the start."""
    coldest: PositiveFloat = 0.1
    """The same at the end."""
    balance: NonNegativeFloat = 0.01
    """Weight of the loss that keeps experts equally busy."""
    z: NonNegativeFloat = 0.001
    """Weight of the loss that keeps logits small."""


@fit(
    "transport",
    learns=("split", "router"),
    summary="split by balanced transport and router, learned together on the layer's error",
    paper="arXiv:2606.01666",
    params=TransportParams,
)
def learn(experts: Experts, lesson: Lesson, params: TransportParams) -> Experts:
    router_ED, down_DF = experts.router_ED.clone(), experts.ffn.down_DF
    shape = (experts.ffn.num_neurons, len(router_ED))
    affinity_FE = NOISE * torch.randn(shape, generator=lesson.rng).to(router_ED)
    steps = lesson.steps(params.epochs)

    def loss(batch: tuple[int, tuple[Tensor, ...]]) -> Tensor:
        step, (x_tD, h_tF, weight_t) = batch
        cooled = params.coldest / params.hottest
        plan_FE = transport(
            affinity_FE, params.hottest * cooled ** (step / steps), params.iterations
        ).exp()
        held_FE = straight_through(partition(plan_FE).to(plan_FE), plan_FE)
        logits_tE = x_tD @ router_ED.T
        on_tF = straight_through_top_k(logits_tE, lesson.top_k) @ held_FE.T
        missing_t = ((h_tF - h_tF * on_tF) @ down_DF.T).square().sum(1)
        error = (weight_t * missing_t).mean() / lesson.unit
        balance = params.balance * imbalance(logits_tE, lesson.top_k)
        return error + balance + params.z * logits_tE.logsumexp(1).square().mean()

    rates = [(affinity_FE, params.rate), (router_ED, params.router_rate * unit_step(router_ED))]
    follow(rates, enumerate(lesson.batches(params.epochs)), loss, steps, lesson.tell)
    plan_FE = transport(affinity_FE, params.coldest, params.iterations).exp()
    owner_F = partition(plan_FE).argmax(1)
    experts_EM = owner_F.argsort(stable=True).view(len(router_ED), -1)
    return Experts(experts.ffn, experts_EM, router_ED)


def imbalance(logits_TE: Tensor, top_k: int) -> Tensor:
    """E / k Σ_e f_e p_e, with f an expert's share of the tokens and p its mean probability: 1 where
    all experts are equally busy (Switch, arXiv:2101.03961)."""
    busy_E = hard_top_k(logits_TE.detach(), top_k).mean(0)
    return logits_TE.shape[1] / top_k * (busy_E @ logits_TE.softmax(1).mean(0))
