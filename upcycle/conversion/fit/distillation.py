"""Distillation: router and experts of a layer learn together what its FFN puts out.

LaDiMo, arXiv:2408.04278: every layer's experts are trained on what the dense model's FFN sees and
puts out, independently of all other layers, by the mean squared error. Only its abstract could be
read; what it does not say (where experts begin, what the router is, rates) is ours. The gradient
passes straight through the router's top k.
"""

from torch import Tensor

from upcycle.conversion.fit.base import (
    Experts,
    FitParams,
    Lesson,
    Rate,
    fit,
    membership,
    straight_through_top_k,
)
from upcycle.conversion.fit.loop import follow, unit_step


class DistillationParams(FitParams):
    rate: Rate = 0.7
    """Of the first steps, over each matrix's root mean square / √inputs."""


@fit(
    "distillation",
    learns=("router", "weights"),
    summary="router and experts learn together what the dense FFN puts out",
    paper="arXiv:2408.04278",
    params=DistillationParams,
)
def learn(experts: Experts, lesson: Lesson, params: DistillationParams) -> Experts:
    router_ED, dense_DF = experts.router_ED.clone(), experts.ffn.down_DF
    ffn = experts.ffn.changed(lambda matrix: matrix.clone())
    held_EF = membership(experts.experts_EM, ffn.num_neurons).to(router_ED)

    def loss(batch: tuple[Tensor, ...]) -> Tensor:
        x_tD, h_tF, weight_t = batch
        on_tF = straight_through_top_k(x_tD @ router_ED.T, lesson.top_k) @ held_EF
        wrong_tD = (ffn.hidden(x_tD) * on_tF) @ ffn.down_DF.T - h_tF @ dense_DF.T
        return (weight_t * wrong_tD.square().sum(1)).mean() / lesson.unit

    learned = [router_ED, *(getattr(ffn, name) for name in ffn.matrices)]
    rates = [(matrix, params.rate * unit_step(matrix)) for matrix in learned]
    steps = lesson.steps(params.epochs)
    follow(rates, lesson.batches(params.epochs), loss, steps, lesson.tell)
    return Experts(ffn, experts.experts_EM, router_ED)
