"""Domain: rows projected from a vector for each expert's domain, so that later experts get theirs.

Nexus, arXiv:2408.15901: a projector makes an expert's row of its domain's vector. The projector
and the vectors are kept beside the checkpoint; the row of an expert that is added is what the same
projector makes of its domain's vector, and no other row changes.

Departures: a domain's vector is the mean of the base's embeddings over the tokens of its text,
where the paper takes an embedding model's. The projector is linear and not learned: of those that
make the rows of `text` it is the smallest. The paper's, a SwiGLU network, is trained with the rest.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from upcycle.router_init.gates.base import GateRows, LayerTexts, gate
from upcycle.router_init.gates.text import FitParams, fitted_rows, memberships

SMALLEST = 1e-6
"""Singular values below this share of the largest are rounding."""


def one_more(texts: LayerTexts, before: GateRows, params: FitParams) -> GateRows:
    new_1V = domain(texts, texts.num_experts - 1)[None]
    kept = dict(before.beside)
    domains_EV = torch.cat([kept["domains"], new_1V.to(kept["domains"])])
    return GateRows(project(kept, domains_EV[-1:]), kept | {"domains": domains_EV})


@gate(
    "domain",
    summary="rows projected from the mean embedding of each expert's text, for experts to come",
    paper="arXiv:2408.15901",
    params=FitParams,
    reads=("embedded", "inputs"),
    add=one_more,
    add_reads=("embedded",),
)
def by_domain(texts: LayerTexts, params: FitParams, rng: torch.Generator) -> GateRows:
    rows_ED = fitted_rows(texts, list(memberships(texts)), params.strength)
    domains_EV = torch.stack([domain(texts, expert) for expert in range(texts.num_experts)])
    centre_V = domains_EV.mean(0)
    inverse_VE = torch.linalg.pinv((domains_EV - centre_V).double(), rtol=SMALLEST)
    projector_VD = (inverse_VE @ rows_ED.double().to(inverse_VE.device)).float()
    beside = {"projector": projector_VD, "centre": centre_V, "domains": domains_EV}
    return GateRows(project(beside, domains_EV), beside)


def domain(texts: LayerTexts, expert: int) -> Tensor:
    """A domain's vector [V]: the mean embedding over an expert's text."""
    places = texts.of(expert, negative=False)
    own = [texts.embedded[i][texts.passages[i].front :].float() for i in places]
    return torch.cat(own).mean(0)


def project(beside: Mapping[str, Tensor], domains_EV: Tensor) -> Tensor:
    """The rows [E, D] of experts with these domains' vectors.

    Args:
        beside: what `by_domain` left.
    """
    return (domains_EV - beside["centre"]) @ beside["projector"]
