"""Noisy top-k: normal noise on the logits selects, so that experts at the edge are tried.

Shazeer et al., ICLR 2017, arXiv:1701.06538, as LLaMA-MoE trains with it (arXiv:2406.16554), beside
the router loss `cv2`. Departure: the noise is one number in units of the logits' first spread, not
learnt per expert; 0.7 is where LLaMA-MoE's begins, softplus(0) + 0.01.
"""

from dataclasses import replace

from pydantic import PositiveFloat

from upcycle.core.registry import Params
from upcycle.finetune.gating.base import Gates, Route, gating


class Noise(Params):
    noise: PositiveFloat = 0.7
    """Standard deviation, in units of a token's logits' before the first step."""


@gating(
    "noisy_top_k",
    summary="noise on the logits lets experts at the edge be tried",
    paper="arXiv:1701.06538",
    params=Noise,
)
def gate(route: Route, params: Noise) -> Gates:
    noise_TE = params.noise * route.numbers.normal_like(route.logits_TE)
    gates = route.gates(route.logits_TE + route.spread * noise_TE)
    return replace(gates, noise_TE=noise_TE, noise=params.noise)
