"""The values that flow through a conversion.

Shape letters, used as suffixes of tensor names everywhere:
T tokens, D hidden_size, F neurons of the dense FFN, N copies, E routed experts, M neurons per
routed expert, S shared neurons, K experts per token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
Selection = Callable[[Tensor], Tensor]
"""What each neuron counts, [T, F] (or for all alike, [T, 1]), for inputs x [T, D]: nothing where no
expert that holds it is on."""
Weigh = Callable[[Tensor], Tensor]
"""What each expert counts, [T, E], by the router's logits [T, E]: nothing where it is not
selected."""

CHUNK_ELEMENTS = 2**24  # of an h_TF chunk: 64 MB in float32, whatever F is
HELD_ELEMENTS = 2**28  # of h_TF that a layer may hold: 1 GB in float32


@dataclass(frozen=True, slots=True)
class DenseFFN:
    """A gated FFN, y = down (act(gate x) * (up x)), or one without a gate, y = down act(up x).

    Neuron i is row i of gate and up, and column i of down.
    """

    gate_FD: Tensor | None
    up_FD: Tensor
    down_DF: Tensor
    act: Activation

    @property
    def num_neurons(self) -> int:
        return self.up_FD.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.up_FD.shape[1]

    @property
    def rows_FD(self) -> Tensor:
        """What decides how much each neuron is on: the gate's rows, or without a gate, up's."""
        return self.up_FD if self.gate_FD is None else self.gate_FD

    @property
    def matrices(self) -> tuple[str, ...]:
        """The fields that hold its weights."""
        names = ("gate_FD", "up_FD", "down_DF")
        return names[1:] if self.gate_FD is None else names

    def changed(self, change: Callable[[Tensor], Tensor]) -> "DenseFFN":
        """The FFN with each of its matrices changed."""
        made: dict[str, Any] = {name: change(getattr(self, name)) for name in self.matrices}
        return replace(self, **made)

    def hidden(self, x_TD: Tensor) -> Tensor:
        """The neurons' activations h [T, F] for inputs x [T, D]."""
        linear = torch.nn.functional.linear
        if self.gate_FD is None:
            return self.act(linear(x_TD, self.up_FD))
        h_TF: Tensor = self.act(linear(x_TD, self.gate_FD)) * linear(x_TD, self.up_FD)
        return h_TF

    def __call__(self, x_TD: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.hidden(x_TD), self.down_DF)

    def hides_as(self, other: "DenseFFN") -> bool:
        """Whether the neurons' activations are another FFN's."""
        return torch.equal(self.rows_FD, other.rows_FD) and torch.equal(self.up_FD, other.up_FD)

    def take(self, neurons: Tensor) -> "DenseFFN":
        """The FFN of these neurons [M] only, in this order."""
        return replace(
            self,
            gate_FD=None if self.gate_FD is None else self.gate_FD[neurons],
            up_FD=self.up_FD[neurons],
            down_DF=self.down_DF[:, neurons],
        )

    @classmethod
    def concatenate(cls, parts: "Sequence[DenseFFN]") -> Self:
        """The FFN of all the parts' neurons, whose output is the parts' sum."""
        gates = [part.gate_FD for part in parts if part.gate_FD is not None]
        gate_FD = torch.cat(gates) if gates else None
        up_FD = torch.cat([part.up_FD for part in parts])
        return cls(gate_FD, up_FD, torch.cat([p.down_DF for p in parts], dim=1), parts[0].act)

    def put(self, neurons: Tensor, other: "DenseFFN") -> "DenseFFN":
        """The FFN with these neurons [M] in place of its own."""
        made: dict[str, Any] = {
            name: getattr(self, name).index_copy(
                int(name == "down_DF"), neurons, getattr(other, name)
            )
            for name in self.matrices
        }
        return replace(self, **made)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "DenseFFN":
        return self.changed(lambda matrix: matrix.to(device, dtype))


@dataclass(frozen=True, slots=True)
class LossGradient:
    """What a backward pass through the dense model says of one FFN's output y. The loss is that of
    the calibration tokens, in nats, summed over them."""

    y_TD: Tensor
    """∂loss/∂y, token by token."""
    text_T: Tensor
    """Which sequence each token is of."""

    def take(self, tokens: slice | Tensor) -> "LossGradient":
        """Of these tokens only, in this order."""
        return LossGradient(self.y_TD[tokens], self.text_T[tokens])


@dataclass(frozen=True)
class LayerActivations:
    """What one FFN sees and does on the calibration tokens.

    Held are the inputs x [T, D], and of the activations h [T, F] at most HELD_ELEMENTS; beyond
    that they are recomputed a chunk at a time in each pass.
    """

    ffn: DenseFFN
    x_TD: Tensor
    whole: "tuple[LayerActivations, Tensor] | None" = None
    """The activations of which these are some neurons', and which neurons."""
    loss: LossGradient | None = None
    """Of the same tokens, if a method looks at it: always the dense model's."""

    def chunks(self, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Tuples (x [t, D], h [t, F]) that together cover the tokens in order, each with the same
        tokens' rows of what is given beside."""
        if self.whole is not None and self.whole[0]._fits:
            activations, neurons_M = self.whole
            for x_tD, h_tF, *rows in activations.chunks(*beside):
                yield x_tD, h_tF[:, neurons_M], *rows
        elif self._fits:
            yield from zip(*self._split(self.x_TD, self._h_TF, *beside), strict=True)
        else:
            for x_tD, *rows in zip(*self._split(self.x_TD, *beside), strict=True):
                yield x_tD, self.ffn.hidden(x_tD), *rows

    @property
    def gradient(self) -> LossGradient:
        """The loss's.

        Raises:
            ValueError: there was no backward pass, as no method's parameters say that it needs one.
        """
        if self.loss is None:
            raise ValueError("the loss's gradient is there if a method's `needs_gradients` is true")
        return self.loss

    def effects(self, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """`chunks` with h ∂loss/∂h [t, F] in place of h: to first order, by how much the loss falls
        when a neuron puts out nothing on a token.

        Raises:
            ValueError: as `gradient`.
        """
        for x_tD, h_tF, gradient_tD, *rows in self.chunks(self.gradient.y_TD, *beside):
            yield x_tD, h_tF * (gradient_tD @ self.ffn.down_DF), *rows

    @property
    def _fits(self) -> bool:
        return len(self.x_TD) * self.ffn.num_neurons <= HELD_ELEMENTS

    @cached_property
    def _h_TF(self) -> Tensor:
        h_TF = self.x_TD.new_empty(len(self.x_TD), self.ffn.num_neurons)
        for x_tD, room_tF in zip(*self._split(self.x_TD, h_TF), strict=True):
            room_tF.copy_(self.ffn.hidden(x_tD))
        return h_TF

    def _split(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        size = max(1, CHUNK_ELEMENTS // self.ffn.num_neurons)
        return [tensor.split(size) for tensor in tensors]

    def output(self) -> Tensor:
        """y [T, D]."""
        y_TD = torch.empty_like(self.x_TD)
        for _, h_tF, room_tD in self.chunks(y_TD):
            torch.matmul(h_tF, self.ffn.down_DF.T, out=room_tD)
        return y_TD

    def energy(self) -> Tensor:
        """How much each neuron puts out, Σ_t h² |down|², [F]."""
        power_F = torch.stack([h_tF.square().sum(0) for _, h_tF in self.chunks()]).sum(0)
        return power_F * self.ffn.down_DF.square().sum(0)

    def take(self, neurons: Tensor) -> "LayerActivations":
        """Of these neurons [M] only, in this order."""
        return LayerActivations(self.ffn.take(neurons), self.x_TD, (self, neurons), self.loss)

    def sample(self, tokens: int) -> "LayerActivations":
        """At most this many tokens, evenly spread."""
        return self.on(slice(None, None, _stride(len(self.x_TD), tokens)))

    def on(self, tokens: slice | Tensor) -> "LayerActivations":
        """On these tokens only, in this order."""
        loss = None if self.loss is None else self.loss.take(tokens)
        return LayerActivations(self.ffn, self.x_TD[tokens], loss=loss)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. (Both show in the least and the greatest
    value, which are found without a temporary of the tensor's size.)"""
    return tensor.numel() == 0 or all(bool(x.isfinite()) for x in tensor.aminmax())


def evenly(tensor: Tensor, wanted: int) -> Tensor:
    """At most `wanted` of the rows, evenly spread."""
    return tensor[:: _stride(len(tensor), wanted)]


def sampled(tokens: int, wanted: int) -> int:
    """How many of `tokens` a sample of at most `wanted` holds."""
    return -(-tokens // _stride(tokens, wanted))


def _stride(tokens: int, wanted: int) -> int:
    return max(1, -(-tokens // wanted))


@dataclass(frozen=True, slots=True)
class Geometry:
    """How many of everything: E routed experts of M neurons each, K of them per token, beside a
    shared expert of S neurons.

    Of a split, S + E M = F. Of copies cut into `granularity` shards, E is copies times shards.
    """

    num_neurons: int
    """F, of the dense FFN."""
    num_experts: int
    """E, as config.json says it."""
    top_k: int
    """K"""
    expert_size: int
    """M"""
    shared_size: int = 0
    """S"""
    granularity: int = 1

    @property
    def copies(self) -> int:
        """Whole copies, of copies."""
        return self.num_experts // self.granularity

    @property
    def whole_copies(self) -> bool:
        """Whether a token can get whole copies only, of copies."""
        return self.top_k % self.granularity == 0

    @property
    def shared_ratio(self) -> float:
        """Neurons that are always on, as a share of the dense FFN's."""
        return self.shared_size / self.num_neurons

    @property
    def idle_neurons(self) -> int:
        """Of the experts that a token does not get."""
        return (self.num_experts - self.top_k) * self.expert_size

    @property
    def active_ratio(self) -> float:
        """Active neurons per token, as a multiple of the dense FFN's."""
        return (self.shared_size + self.top_k * self.expert_size) / self.num_neurons


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Which neurons of the dense FFN each expert holds: indices, never weights.

    A neuron that is shared belongs to no routed expert. Of the others, most splits give each to one
    expert; some give a neuron to several experts and another to none.
    """

    experts_EM: Tensor
    shared_S: Tensor

    @property
    def permutation(self) -> Tensor:
        """The layout's neurons, shared first, then expert by expert; F entries, of a split."""
        return torch.cat([self.shared_S, self.experts_EM.flatten()])

    @classmethod
    def of_permutation(cls, permutation: Tensor, shared_size: int, num_experts: int) -> Self:
        """The layout that has this permutation."""
        return cls(permutation[shared_size:].view(num_experts, -1), permutation[:shared_size])

    @property
    def multiplicity(self) -> Tensor:
        """How many experts hold each neuron, the shared one included, [F]; a split's."""
        permutation = self.permutation
        return permutation.bincount(minlength=len(permutation))

    def selection(self, router_ED: Tensor, weigh: Weigh) -> Selection:
        """What the neurons count when a token's experts count by its logits."""
        num_neurons = len(self.permutation)
        held_EF = router_ED.new_zeros(len(router_ED), num_neurons)
        held_EF.scatter_(1, self.experts_EM.to(router_ED.device), 1)
        shared_F = router_ED.new_zeros(num_neurons)
        shared_F[self.shared_S] = 1

        def select(x_TD: Tensor) -> Tensor:
            return shared_F + weigh(x_TD @ router_ED.T) @ held_EF

        return select


@dataclass(frozen=True, slots=True)
class MoELayer:
    """A converted FFN before it takes a target's names and gains.

    `expert(e)` makes expert e on demand, so that copies never lie in memory together.
    """

    router_ED: Tensor
    expert: Callable[[int], DenseFFN]
    shared: DenseFFN | None
    shared_gate_1D: Tensor | None = None
    """The row by whose logistic sigmoid the shared expert counts; None: it always counts 1."""
    granularity: int = 1
    """Experts that follow one another and are the shards of one copy."""

    @property
    def num_experts(self) -> int:
        return self.router_ED.shape[0]

    def __call__(self, x_TD: Tensor, weigh: Weigh) -> Tensor:
        """The reference forward: the shared expert and what the routed ones count."""
        weight_TE = weigh(x_TD @ self.router_ED.T)
        y_TD = self.shared(x_TD) if self.shared else torch.zeros_like(x_TD)
        if self.shared_gate_1D is not None:
            y_TD = y_TD * (x_TD @ self.shared_gate_1D.T).sigmoid()
        for e in range(self.num_experts):
            y_TD = y_TD + weight_TE[:, e, None] * self.expert(e)(x_TD)
        return y_TD
