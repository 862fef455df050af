"""Spectral: neurons that the co-activation graph joins by many ways share an expert.

Normalised spectral clustering (Shi and Malik 2000; Ng, Jordan and Weiss, NIPS 2001) of the graph of
neurons that fire together, as `coactivation_graph` counts it: each neuron is a row of the E leading
eigenvectors of D^-1/2 A D^-1/2, scaled to unit length. Every edge is strengthened by the mean one
(Amini et al. 2013), or a few neurons that fire with no others would have an eigenvector to
themselves.

Departure: k-means is balanced, so that experts are of equal size.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from upcycle.core.clustering import balanced_kmeans
from upcycle.core.rng import draw_seed
from upcycle.core.types import LayerActivations
from upcycle.split.base import split_from_activations
from upcycle.split.coactivation_graph import Counts, FiringParams, coactivation_counts


@split_from_activations(
    "spectral",
    summary="balanced k-means of the spectrum of the graph of neurons that fire together",
    paper="ours; after arXiv:2110.01786",
    params=FiringParams,
)
def split(
    activations: LayerActivations, num_experts: int, params: FiringParams, rng: torch.Generator
) -> Tensor:
    if num_experts == 1:
        return torch.arange(activations.ffn.num_neurons)[None]
    fraction = params.fire_fraction or 1 / num_experts
    edges_FF = strengthened(coactivation_counts(activations, fraction, params.batch_tokens))
    return balanced_kmeans(embedding(edges_FF, num_experts, draw_seed(rng)), num_experts, rng)[0]


def strengthened(count_FF: Counts) -> NDArray[np.float64]:
    """Every edge with the mean one added, so that all neurons are joined, [F, F]."""
    edges_FF = count_FF.astype(np.float64)
    np.fill_diagonal(edges_FF, 0)
    edges_FF += edges_FF.mean() or 1
    return edges_FF


def embedding(edges_FF: NDArray[np.float64], num_parts: int, seed: int) -> Tensor:
    """Unit rows of the leading eigenvectors, [F, E]; one fewer, where each neuron is a part."""
    from sklearn.manifold import spectral_embedding

    found_FE = spectral_embedding(
        edges_FF,
        n_components=min(num_parts, len(edges_FF) - 1),
        eigen_solver="arpack",
        random_state=seed,
        drop_first=False,
    )
    return normalize(torch.from_numpy(found_FE), dim=1)
