"""The values that flow through a conversion.

Shape letters, used as suffixes of tensor names everywhere:
T tokens, D hidden_size, F neurons of the dense FFN, N granules or copies, E routed experts,
M neurons per routed expert, S shared neurons, K experts per token.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]

CHUNK_ELEMENTS = 2**24  # of an h_TF chunk: 64 MB in float32, whatever F is


@dataclass(frozen=True, slots=True)
class DenseFFN:
    """A gated FFN: y = down (act(gate x) * (up x)).

    Neuron i is row i of gate and up, and column i of down.
    """

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor
    act: Activation

    @property
    def num_neurons(self) -> int:
        return self.gate_FD.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.gate_FD.shape[1]

    def hidden(self, x_TD: Tensor) -> Tensor:
        """The neurons' activations h [T, F] for inputs x [T, D]."""
        linear = torch.nn.functional.linear
        h_TF: Tensor = self.act(linear(x_TD, self.gate_FD)) * linear(x_TD, self.up_FD)
        return h_TF

    def __call__(self, x_TD: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.hidden(x_TD), self.down_DF)

    def take(self, neurons: Tensor) -> "DenseFFN":
        """The FFN of these neurons [M] only, in this order."""
        return replace(
            self,
            gate_FD=self.gate_FD[neurons],
            up_FD=self.up_FD[neurons],
            down_DF=self.down_DF[:, neurons],
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "DenseFFN":
        return replace(
            self,
            gate_FD=self.gate_FD.to(device, dtype),
            up_FD=self.up_FD.to(device, dtype),
            down_DF=self.down_DF.to(device, dtype),
        )


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """What one FFN sees and does on the calibration tokens.

    Only the inputs x [T, D] are held; h [T, F] is recomputed a chunk at a time, so memory does
    not grow with T x F.
    """

    ffn: DenseFFN
    x_TD: Tensor

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (x [t, D], h [t, F]) that together cover the tokens in order."""
        for x_tD in self.x_TD.split(max(1, CHUNK_ELEMENTS // self.ffn.num_neurons)):
            yield x_tD, self.ffn.hidden(x_tD)

    def take(self, neurons: Tensor) -> "LayerActivations":
        return replace(self, ffn=self.ffn.take(neurons))

    def sample(self, tokens: int) -> "LayerActivations":
        """At most this many tokens, evenly spread."""
        stride = max(1, -(-len(self.x_TD) // tokens))
        return replace(self, x_TD=self.x_TD[::stride])


@dataclass(frozen=True, slots=True)
class Geometry:
    """How many of everything. For a split, N granules of F / N neurons, S of them shared and
    E = N - S routed. For copies, N copies cut into `granularity` shards each."""

    num_experts: int
    """N: `--experts`"""
    top_k: int
    shared_experts: int = 0
    granularity: int = 1
    copies: bool = False

    @property
    def routed_experts(self) -> int:
        return self.num_experts * self.granularity - self.shared_experts

    def expert_size(self, num_neurons: int) -> int:
        """M, for a dense FFN of F neurons."""
        return num_neurons // (self.granularity if self.copies else self.num_experts)

    def shared_size(self, num_neurons: int) -> int:
        return self.shared_experts * self.expert_size(num_neurons)

    def active_ratio(self) -> float:
        """Active neurons per token, as a multiple of the dense FFN's."""
        total = self.granularity if self.copies else self.num_experts
        return (self.top_k + self.shared_experts) / total


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Which neurons of the dense FFN each expert holds: indices, never weights."""

    experts_EM: Tensor
    shared_S: Tensor

    @property
    def permutation(self) -> Tensor:
        """All the layout's neurons, shared first, then expert by expert."""
        return torch.cat([self.shared_S, self.experts_EM.flatten()])


@dataclass(frozen=True, slots=True)
class MoELayer:
    """A converted FFN before it takes a target's names and gains.

    `expert(e)` makes expert e on demand, so that copies never lie in memory together.
    """

    router_ED: Tensor
    expert: Callable[[int], DenseFFN]
    shared: DenseFFN | None

    @property
    def num_experts(self) -> int:
        return self.router_ED.shape[0]

    def __call__(self, x_TD: Tensor, top_k: int, *, average: bool = False) -> Tensor:
        """The reference forward: the unweighted sum of the shared expert and the top_k routed
        ones, or with `average` the routed ones weighted by softmax over the selected logits."""
        logits_TE = x_TD @ self.router_ED.T
        chosen = logits_TE.topk(top_k, dim=-1)
        weights_TK = chosen.values.softmax(-1) if average else torch.ones_like(chosen.values)
        weight_TE = torch.zeros_like(logits_TE).scatter(-1, chosen.indices, weights_TK)
        y_TD = self.shared(x_TD) if self.shared else torch.zeros_like(x_TD)
        for e in range(self.num_experts):
            y_TD = y_TD + weight_TE[:, e, None] * self.expert(e)(x_TD)
        return y_TD
