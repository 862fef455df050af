"""Membership: predict from x to which region of hidden states a token belongs.

The regions are those of a balanced k-means, as in `kmeans`. A centroid says where a region lies,
not where it ends: by dot product the longest ones win, and without a bias nothing makes up for
that (in a layer of SmolLM2-135M one of 16 then takes every token). Here the rows are the ridge
regression of membership on x, and experts get about equally many tokens.
"""

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.core.regression import ridge
from upcycle.core.types import LayerActivations
from upcycle.router_init.base import router_from_activations
from upcycle.router_init.kmeans import clusters


class MembershipParams(Params):
    tokens: PositiveInt = 16384
    """Hidden states that are clustered, and on which the router is fitted."""
    strength: PositiveFloat = 0.1
    """λ over the mean second moment of x."""


@router_from_activations(
    "membership",
    summary="ridge regression of membership in clusters of a balanced k-means on x",
    paper="ours",
    params=MembershipParams,
    tells_copies_apart=True,
)
def router(
    activations: LayerActivations,
    experts_EM: Tensor,
    params: MembershipParams,
    rng: torch.Generator,
) -> Tensor:
    x_EtD = clusters(activations, experts_EM, params.tokens, rng)
    member_EE = torch.eye(len(x_EtD)).to(x_EtD) - 1 / len(x_EtD)
    pairs = (
        (x_tD, row_E.expand(len(x_tD), -1)) for x_tD, row_E in zip(x_EtD, member_EE, strict=True)
    )
    return ridge(pairs, params.strength)
