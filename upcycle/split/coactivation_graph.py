"""Co-activation graph: cut the graph of neurons that fire together.

The second split of MoEfication, arXiv:2110.01786: an edge counts the small batches of tokens in
which both neurons fire, weak edges are dropped, METIS cuts the graph into equal parts, and
neurons over a part's size move at random to parts with room.

Departure: the paper's ReLU neurons fire when they are not zero. Gated neurons are never zero, so
here the `fire_fraction` of a token's neurons with the largest |h| * |down| fire.
"""

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from upcycle.registry import Params
from upcycle.rng import draw_seed
from upcycle.split.base import split_from_activations
from upcycle.types import CHUNK_ELEMENTS, LayerActivations


class GraphParams(Params):
    fire_fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the neurons that fire on a token; by default one expert's, 1 / E."""
    batch_tokens: PositiveInt = 8
    """Tokens per batch within which firing counts once."""
    max_edges_per_neuron: PositiveInt = 256


@split_from_activations(
    "coactivation_graph",
    summary="METIS cut of the graph of neurons that fire together",
    paper="arXiv:2110.01786",
    params=GraphParams,
)
def split(
    activations: LayerActivations, num_experts: int, params: GraphParams, rng: torch.Generator
) -> Tensor:
    if num_experts == 1:
        return torch.arange(activations.ffn.num_neurons)[None]
    fraction = params.fire_fraction or 1 / num_experts
    count_FF = coactivation_counts(activations, fraction, params.batch_tokens)
    weight_FF = prune(count_FF, params.max_edges_per_neuron)
    return rebalance(cut(weight_FF, num_experts, draw_seed(rng)), num_experts, rng)


def coactivation_counts(
    activations: LayerActivations, fire_fraction: float, batch_tokens: int
) -> Tensor:
    """In how many batches of tokens neurons i and j both fire, [F, F], zero diagonal."""
    num_neurons = activations.ffn.num_neurons
    norm_F = activations.ffn.down_DF.norm(dim=0)
    firing = max(1, round(fire_fraction * num_neurons))
    count_FF = torch.zeros(num_neurons, num_neurons)
    chunk = max(1, CHUNK_ELEMENTS // num_neurons // batch_tokens) * batch_tokens
    for x_bD in activations.x_TD.split(chunk):
        strength_bF = activations.ffn.hidden(x_bD).abs() * norm_F
        top = strength_bF.topk(firing, dim=1).indices
        fires_bF = torch.zeros_like(strength_bF).scatter_(1, top, 1.0)
        batches = [b.amax(0) for b in fires_bF.split(batch_tokens)]
        fires_nF = torch.stack(batches).cpu()
        count_FF += fires_nF.T @ fires_nF
    return count_FF.fill_diagonal_(0)


def prune(count_FF: Tensor, max_edges: int) -> Tensor:
    """Integer edge weights: counts in units of their first non-zero decile, the weaker dropped."""
    if not count_FF.any():
        return count_FF.long()
    deciles = torch.from_numpy(np.quantile(count_FF.numpy(), np.linspace(0.1, 1, 10)))
    unit = deciles[deciles > 0][0] * 0.99
    weight_FF = (count_FF / unit).long()
    if max_edges < len(count_FF):
        weakest = weight_FF.topk(max_edges, dim=1).values[:, -1:]
        kept = weight_FF >= weakest
        weight_FF = weight_FF * (kept | kept.T)
    return weight_FF


def cut(weight_FF: Tensor, num_parts: int, seed: int) -> Tensor:
    """METIS's part of each neuron [F]; parts are about equal."""
    import pymetis

    rows, columns = weight_FF.nonzero(as_tuple=True)
    starts = torch.cat(
        [torch.zeros(1, dtype=torch.int64), rows.bincount(minlength=len(weight_FF)).cumsum(0)]
    )
    _, parts = pymetis.part_graph(
        num_parts,
        xadj=starts.numpy(),
        adjncy=columns.numpy(),
        eweights=weight_FF[rows, columns].numpy(),
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
