"""Co-activation graph: cut the graph of neurons that fire together.

The second split of MoEfication, arXiv:2110.01786: an edge counts the small batches of tokens in
which both neurons fire on the same token, weak edges are dropped, METIS cuts the graph into equal
parts, and neurons over a part's size move at random to parts with room.

Departures: the paper's ReLU neurons fire when they are not zero. Gated neurons are never zero, so
here the `fire_fraction` of a token's neurons with the largest |h| |down| fire. The released code
adds min(1, Σ h_i h_j) of a batch's tokens, which is less than 1 where a ReLU's outputs are small;
here a batch adds 1 or nothing.
"""

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.core.rng import draw_seed
from upcycle.core.types import CHUNK_ELEMENTS, LayerActivations
from upcycle.split.base import split_from_activations

Counts = NDArray[np.int32]
Graph = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""As METIS takes it: where each neuron's edges start [F + 1], where they lead, what they weigh."""


class FiringParams(Params):
    fire_fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the neurons that fire on a token; by default one expert's, 1 / E."""
    batch_tokens: int = Field(default=8, ge=1, le=8)
    """Tokens per batch, in which a pair counts once."""


class GraphParams(FiringParams):
    max_edges_per_neuron: PositiveInt | None = None
    """Keep only a neuron's strongest edges. All, as in the paper, take up to 24 F² bytes: 5 GB
    for 14,336 neurons."""


@split_from_activations(
    "coactivation_graph",
    summary="METIS cut of the graph of neurons that fire together",
    paper="arXiv:2110.01786",
    params=GraphParams,
    extra=("pymetis", "metis"),
)
def split(
    activations: LayerActivations, num_experts: int, params: GraphParams, rng: torch.Generator
) -> Tensor:
    if num_experts == 1:
        return torch.arange(activations.ffn.num_neurons)[None]
    fraction = params.fire_fraction or 1 / num_experts
    graph = edges(
        coactivation_counts(activations, fraction, params.batch_tokens), params.max_edges_per_neuron
    )
    return rebalance(cut(graph, num_experts, draw_seed(rng)), num_experts, rng)


def coactivation_counts(
    activations: LayerActivations, fire_fraction: float, batch_tokens: int
) -> Counts:
    """In how many batches neurons i and j fire on the same token, [F, F]."""
    num_neurons = activations.ffn.num_neurons
    norm_F = activations.ffn.down_DF.norm(dim=0)
    firing = max(1, round(fire_fraction * num_neurons))
    count_FF = np.zeros((num_neurons, num_neurons), dtype=np.int32)
    chunk = max(1, CHUNK_ELEMENTS // num_neurons // batch_tokens) * batch_tokens
    for x_bD in activations.x_TD.split(chunk):
        strength_bF = activations.ffn.hidden(x_bD).abs() * norm_F
        top = strength_bF.topk(firing, dim=1).indices
        fires_bF = torch.zeros_like(strength_bF, dtype=torch.bool).scatter_(1, top, True)
        _add_meetings(count_FF, _tokens_fired_on(fires_bF.cpu(), batch_tokens))
    return np.maximum(count_FF, count_FF.T)


def _tokens_fired_on(fires_bF: Tensor, batch_tokens: int) -> NDArray[np.uint8]:
    """A bit for each token of a batch on which a neuron fires, [F, batches]."""
    batches = [np.packbits(batch.numpy(), axis=0)[0] for batch in fires_bF.split(batch_tokens)]
    return np.stack(batches, axis=1)


def _add_meetings(count_FF: Counts, fired_Fn: NDArray[np.uint8]) -> None:
    """Count the batches in which two neurons share a bit, in the upper triangle.

    By bits this is several times faster than by products of the F x F matrices of every batch.
    """
    for i, fired_n in enumerate(fired_Fn):
        meet = (fired_Fn[i:] & fired_n) != 0
        count_FF[i, i:] += meet.sum(axis=1, dtype=np.int32)


def edges(count_FF: Counts, most: int | None = None) -> Graph:
    """The graph in units of the counts' first decile that is not zero; what is less is dropped.

    Args:
        most: keep only edges that are among as many strongest of one of their ends.
    """
    deciles = np.quantile(count_FF, np.linspace(0.1, 1, 10))
    unit = 0.99 * next((decile for decile in deciles if decile > 0), 1)
    kept_FF = count_FF >= unit
    np.fill_diagonal(kept_FF, False)
    if most is not None:
        kept_FF &= _strongest(count_FF, most)
    starts = np.concatenate([[0], kept_FF.sum(axis=1).cumsum()])
    neighbours, weights = np.empty((2, starts[-1]), dtype=np.int64)
    for i, (start, stop) in enumerate(pairwise(starts)):
        neighbours[start:stop] = kept_FF[i].nonzero()[0]
        weights[start:stop] = count_FF[i, neighbours[start:stop]] / unit
    return starts, neighbours, weights


def _strongest(count_FF: Counts, most: int) -> NDArray[np.bool_]:
    """Which pairs are among the strongest of one of the two."""
    others_FF = count_FF.copy()
    np.fill_diagonal(others_FF, 0)
    rank = max(0, len(others_FF) - most)
    weakest_F = np.partition(others_FF, rank, axis=1)[:, rank]
    return others_FF >= np.minimum.outer(weakest_F, weakest_F)


def cut(graph: Graph, num_parts: int, seed: int) -> Tensor:
    """METIS's part of each neuron [F]; parts are about equal."""
    import pymetis

    starts, neighbours, weights = graph
    _, parts = pymetis.part_graph(
        num_parts,
        pymetis.CSRAdjacency(starts, neighbours),
        eweights=weights,
        options=pymetis.Options(seed=seed),
    )
    return torch.tensor(parts)


def rebalance(part_F: Tensor, num_parts: int, rng: torch.Generator) -> Tensor:
    """Equal parts [E, M]: neurons over a part's size go at random to parts with room."""
    size = len(part_F) // num_parts
    shuffled = torch.randperm(len(part_F), generator=rng)
    parts = [shuffled[part_F[shuffled] == e] for e in range(num_parts)]
    spare = torch.cat([p[size:] for p in parts])
    spare = spare[torch.randperm(len(spare), generator=rng)]
    rows = []
    for part in parts:
        missing = max(0, size - len(part))
        rows.append(torch.cat([part[:size], spare[:missing]]))
        spare = spare[missing:]
    return torch.stack(rows).sort(1).values
