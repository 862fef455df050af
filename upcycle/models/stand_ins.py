"""Modules that stand in for a layer, or for a part of one."""

from collections.abc import MutableMapping
from copy import copy
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from upcycle.core.types import DenseFFN


class StandIn(nn.Module):
    """Of the same kind as a decoder layer, by which some models choose what they call it with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if isinstance(value, str):
                setattr(self, name, value)


class Recorder(StandIn):
    """Stands in for a decoder layer: keeps what it was called with, passes the input on."""

    hidden: Tensor

    def __init__(self, layer: nn.Module, handed_on: int) -> None:
        super().__init__(layer)
        self.names, self.handed_on = list(signature(layer.forward).parameters)[1:], handed_on
        self.arguments: dict[int, dict[str, Any]] = {}
        """By the sequences' length."""
        self.beside: list[tuple[Any, ...]] = []
        """By batch, what each token has of its own beside its hidden state."""

    def forward(self, hidden: Tensor, *beside: Any, **arguments: Any) -> Any:
        self.hidden = hidden
        if self.handed_on:
            arguments |= zip(self.names, beside, strict=False)
            beside = ()
        self.arguments[hidden.shape[1]] = arguments
        self.beside.append(tuple(x.clone() if isinstance(x, Tensor) else x for x in beside))
        return (hidden, *[None] * self.handed_on) if self.handed_on else hidden

    def left(self, length: int) -> dict[str, Any]:
        """Arguments in which layers leave something for later ones: as yet, nothing."""
        given = self.arguments[length].items()
        return {name: copy(x) for name, x in given if isinstance(x, MutableMapping)}


class SilentFFN(nn.Module):
    """Stands in for an FFN: keeps its input, adds nothing to the residual stream."""

    x_bLD: Tensor

    def forward(self, x_bLD: Tensor) -> Tensor:
        self.x_bLD = x_bLD
        return torch.zeros_like(x_bLD)


class SilentMixer(nn.Module):
    """Stands in for what mixes tokens: itself, until it has been added and is dropped; then
    nothing, in the same form."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer: nn.Module | None = mixer
        self.others = 0

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Any:
        if self.mixer is not None:
            out = self.mixer(hidden_states, **arguments)
            self.others = len(out) - 1 if isinstance(out, tuple) else 0
            return out
        nothing = torch.zeros_like(hidden_states)
        return (nothing, *[None] * self.others) if self.others else nothing


class Replay(nn.Module):
    """Stands in for an FFN whose output is known."""

    def __init__(self, y_TD: Tensor) -> None:
        super().__init__()
        self.rest_TD = y_TD

    def forward(self, x_bLD: Tensor) -> Tensor:
        tokens = x_bLD[..., 0].numel()
        y_bLD = self.rest_TD[:tokens].view_as(x_bLD)
        self.rest_TD = self.rest_TD[tokens:]
        return y_bLD.to(x_bLD.dtype)


class Constant(StandIn):
    """Stands in for all layers: what they put out."""

    def __init__(self, layer: nn.Module, hidden_bLD: Tensor) -> None:
        super().__init__(layer)
        self.hidden_bLD = hidden_bLD

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.hidden_bLD


class Given(nn.Module):
    """Stands in for an FFN: another one."""

    def __init__(self, ffn: DenseFFN) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x_bLD: Tensor) -> Tensor:
        return self.ffn(x_bLD)
