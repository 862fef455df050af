"""benchmarks/routers.py: MoEfication's trained router begins as its centre router, and learns."""

from pathlib import Path

import pytest
import torch
from tiny import normal
from torch.nn.functional import normalize, silu

from upcycle.core.types import DenseFFN, ExpertLayout, LayerActivations
from upcycle.router_init import ROUTERS

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
D, F, E, K, T = 8, 32, 4, 2, 1536


@pytest.fixture
def routers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import routers

    return routers


def centre(ffn, experts_EM):
    method = ROUTERS["centroid"]
    activations = LayerActivations(ffn, torch.zeros(0, D))
    return method.run(activations, experts_EM, method.params(), torch.Generator())


def test_moefications_router_chooses_as_its_centres_before_it_learns_and_better_after(routers):
    """tanh keeps the order of the centres' scores, and the second matrix is the identity."""
    ffn = DenseFFN(normal(F, D, seed=0), normal(F, D, seed=1), normal(D, F, seed=2), silu)
    layout = ExpertLayout(torch.arange(F).view(E, -1), torch.arange(0))
    split, x_TD = routers.Split(ffn, layout, K), normal(T, D, seed=3)
    centre_ED = centre(ffn, layout.experts_EM)
    network, rate = routers.networks(centre_ED)["trained MLP"]
    with torch.no_grad():
        before_TE = network(normalize(x_TD))
    plain_TK = (x_TD @ centre_ED.T).topk(K).indices.sort().values
    assert torch.equal(before_TE.topk(K).indices.sort().values, plain_TK)
    energy_TE = split.energies(x_TD)
    learned, epoch = routers.train(network, rate, split, x_TD, 5, torch.Generator().manual_seed(0))
    assert epoch > 0
    with torch.no_grad():
        after_TE = learned(x_TD)
    assert split.kept(after_TE, energy_TE) > split.kept(before_TE, energy_TE) + 0.01
