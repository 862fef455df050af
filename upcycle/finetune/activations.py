"""ReLU in place of a dense model's activation, before the model is split: what it makes of a neuron
is exactly zero or counts, where silu and gelu leave a little of every one.

A gated FFN has its activation on the gate alone, so that of a neuron is zero where its gate is.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.foreign import read_json
from upcycle.core.json_text import json_text
from upcycle.finetune.data import Data
from upcycle.models.families import FAMILIES, describe

FIELDS = ("hidden_act", "hidden_activation")
"""Of configs, by the name of which an FFN's class finds its activation."""
EXACT = ("relu", "relu2")
"""Activations that are exactly zero for half of all numbers already."""


def check_swap(label: str, config: PreTrainedConfig, activation: str) -> None:
    """Of what can be known by the config.

    Raises:
        UpcycleError: the model has experts already, is of no family that becomes an MoE, has such
            an activation, or one that config.json does not name.
    """
    given, config = setting("activation", activation), config.get_text_config()
    try:
        found = describe(config).fields["hidden_act"]
    except UpcycleError as error:
        raise UpcycleError(f"{given} is for dense models before a split: {error}") from error
    if found in EXACT:
        raise UpcycleError(
            f"{given}: the FFNs of {label} compute {found}, whose zeros are exact already: "
            "`upcycle convert` it as it is"
        )
    if config_field(config) is None:
        raise UpcycleError(
            f"{given}: {config.model_type} computes {found} whatever its config.json says, so no "
            "checkpoint could have another activation: start from another family"
        )


def config_field(config: PreTrainedConfig) -> str | None:
    """What a text model's config calls the activation of its FFNs, if it names it."""
    declared = type(config).__annotations__
    return next((name for name in FIELDS if name in declared), None)


def name_activation(path: Path, config: PreTrainedConfig, activation: str) -> None:
    """Give a config.json another activation, and leave all else as it is.

    Args:
        config: what transformers makes of it.
    """
    text = config.get_text_config()
    fields = read_json(path)
    own = fields if text is config else fields.setdefault("text_config", {})
    own[str(config_field(text))] = activation
    path.write_text(json_text(fields, indent=2) + "\n", encoding="utf-8")


@dataclass
class ActivationTap:
    """Watches what activations put out during `recording`."""

    modules: list[nn.Module]
    outputs: list[Tensor] = field(default_factory=list)
    """Of each module [B, L, F], with gradients."""
    zeros_of_original: float = math.nan
    """Share of what the model's own activations put out that was exactly zero."""
    zeros_before: float = math.nan
    """The same of the new ones, before training."""
    _on: bool = False

    def __post_init__(self) -> None:
        for module in self.modules:
            module.register_forward_hook(self._see)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Collect what the next forward pass does in `outputs`, layer after layer."""
        self.outputs, self._on = [], True
        try:
            yield
        finally:
            self._on = False

    @torch.no_grad()
    def zeros(self, model: Any, held: Data) -> float:
        """Share of outputs for the tokens of a text that are exactly zero."""
        zeros = total = 0
        for tokens_L, mask_L in zip(held.tokens_BL, held.mask_BL, strict=True):
            with self.recording():
                model(input_ids=tokens_L[mask_L][None].to(model.device), use_cache=False)
            zeros += sum(int((output_BLF == 0).sum()) for output_BLF in self.outputs)
            total += sum(output_BLF.numel() for output_BLF in self.outputs)
        self.outputs = []
        return zeros / total

    def _see(self, _: nn.Module, __: Any, output_BLF: Tensor) -> None:
        if self._on:
            self.outputs.append(output_BLF)


def swap(model: Any, activation: str, held: Data) -> ActivationTap:
    """Give the model's FFNs another activation, as its class does by config.json.

    Args:
        held: text that zeros are counted on.

    Raises:
        UpcycleError: by its config the class would change no FFN, or something else too.
    """
    changed = _changed_modules(model, activation)
    zeros = ActivationTap([model.get_submodule(name) for name in changed]).zeros(model, held)
    for name, module in changed.items():
        model.set_submodule(name, module)
    _set_activation(model.config, activation)
    tap = ActivationTap(list(changed.values()), zeros_of_original=zeros)
    tap.zeros_before = tap.zeros(model, held)
    return tap


def _changed_modules(model: Any, activation: str) -> dict[str, nn.Module]:
    """What the model's class builds in other places' stead with the activation, by name."""
    config = deepcopy(model.config)
    _set_activation(config, activation)
    with torch.device("meta"):
        other = type(model)(config)
    pairs = list(zip(model.named_modules(), other.named_modules(), strict=True))
    changed = {name: new for (name, old), (_, new) in pairs if type(old) is not type(new)}
    ffn = FAMILIES[config.get_text_config().model_type].blocks.ffn
    # A class may also keep the name and look the function up in its forward pass.
    named = [name for (name, old), (_, new) in pairs if _strings(old) != _strings(new)]
    beside = named + [name for name in changed if ffn not in name.split(".")]
    if beside or not changed:
        raise UpcycleError(
            f"{setting('activation', activation)} changes {beside[0] if beside else 'nothing'} in "
            f"{type(model).__name__}, but is to change its FFNs alone: start from another family"
        )
    return changed


def _strings(module: nn.Module) -> dict[str, str]:
    return {name: value for name, value in vars(module).items() if isinstance(value, str)}


def _set_activation(config: PreTrainedConfig, activation: str) -> None:
    text = config.get_text_config()
    setattr(text, str(config_field(text)), activation)
