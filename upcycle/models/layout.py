"""Which tensors a checkpoint holds: its text model's, and those of other parts beside it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from upcycle.core.foreign import blaming
from upcycle.models.holders import stored_name
from upcycle.models.stream import skeleton

TEXT = "model."
"""What the names of a text model's tensors begin with, but for its head's."""


@dataclass(frozen=True)
class Layout:
    """What transformers makes of the names in a checkpoint. A text model's tensors are known by
    the names that they have where it is alone, all others by those in the whole model."""

    config: PreTrainedConfig
    """Of the whole model."""
    base: str
    """What names in the whole model begin with outside its head; see `plain_names`."""
    place: str
    """What the names of the text model's tensors begin with there."""
    expected: Mapping[str, tuple[int, ...]]
    """The shapes of the whole model's tensors."""
    text: frozenset[str]
    """Those that are the text model's."""
    ignored: re.Pattern[str]
    """Names of tensors that transformers passes over without a word."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Layout":
        """Of the checkpoints that have this config."""
        text = skeleton(config.get_text_config())
        whole = text if config is config.get_text_config() else _whole(config)
        decoder = whole.get_decoder()
        (place,) = (name for name, module in whole.named_modules() if module is decoder)
        patterns = sorted(whole._keys_to_ignore_on_load_unexpected or ())
        names = frozenset(text.state_dict())
        stored = {name: tuple(t.shape) for name, t in whole.state_dict().items()}
        return cls(
            config=config,
            base=whole.base_model_prefix,
            place=f"{place}.",
            expected={_short(name, f"{place}.", names): shape for name, shape in stored.items()},
            text=names,
            ignored=re.compile("|".join(patterns) or "(?!)"),
        )

    def short(self, name: str) -> str:
        """What a tensor of the whole model is known by."""
        return _short(name, self.place, self.text)

    def full(self, name: str) -> str:
        """What a tensor of the text model, or one in its place, is called in the whole one."""
        apart = name in self.expected and name not in self.text
        return name if apart or not name.startswith(TEXT) else self.place + name.removeprefix(TEXT)

    def stored(self, name: str) -> str:
        """What a tensor of the whole model, by its full name there, is called in checkpoints."""
        return stored_name(self.config.model_type, name)

    def parts(self, names: Iterable[str]) -> frozenset[str]:
        """The tensors among these that are not the text model's: all that nothing is done to."""
        return frozenset(name for name in names if name not in self.text)


def _short(name: str, place: str, text: frozenset[str]) -> str:
    short = TEXT + name.removeprefix(place)
    return short if name.startswith(place) and short in text else name


def _whole(config: PreTrainedConfig) -> PreTrainedModel:
    """The whole model on the meta device."""
    with blaming("transformers can't build a model from config.json"), torch.device("meta"):
        auto = AutoModelForImageTextToText
        model: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
    return model
