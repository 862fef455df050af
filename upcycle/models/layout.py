"""Which tensors a checkpoint holds: its text model's, and those of other parts beside it."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from upcycle.core.foreign import blaming
from upcycle.models.families import FAMILIES, is_encoder
from upcycle.models.families.base import Stack
from upcycle.models.holders import stored_name
from upcycle.models.names import EMBEDDINGS, HEAD
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
    twins: frozenset[str] = frozenset()
    """Names by which a checkpoint may hold the embeddings again."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Layout":
        """Of the checkpoints that have this config."""
        text = skeleton(config.get_text_config())
        family = FAMILIES[config.get_text_config().model_type]
        if len(family.stacks) > 1:
            return _StackedLayout.of_model(text, family.stacks)
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


@dataclass(frozen=True)
class _StackedLayout(Layout):
    """Of an encoder-decoder, whose layers are counted from the encoder's first to the decoder's
    last."""

    stacks: tuple["_Counted", ...] = ()
    embeddings: str = ""
    """The name of what both stacks make their first hidden states by."""

    @classmethod
    def of_model(cls, model: PreTrainedModel, stacks: Collection[Stack]) -> Layout:
        """Of the checkpoints of a model of these stacks."""
        embeddings = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
        layout = cls(
            config=model.config,
            base=model.base_model_prefix,
            place="",
            expected={},
            text=frozenset(),
            ignored=re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ()) or "(?!)"),
            twins=frozenset(model._tied_weights_keys) - {HEAD},
            stacks=tuple(_counted(model.config, stacks)),
            embeddings=f"{embeddings}.weight",
        )
        stored = {layout.short(name): tuple(t.shape) for name, t in model.state_dict().items()}
        expected = {name: shape for name, shape in stored.items() if name not in layout.twins}
        return replace(layout, expected=expected, text=frozenset(expected))

    def short(self, name: str) -> str:
        if name == self.embeddings:
            return EMBEDDINGS
        for stack in self.stacks:
            if name.startswith(stack.place):
                number, _, rest = name.removeprefix(stack.place).partition(".")
                return f"{TEXT}layers.{stack.first + int(number)}.{rest}"
        return name

    def full(self, name: str) -> str:
        if name == EMBEDDINGS:
            return self.embeddings
        if not name.startswith(f"{TEXT}layers."):
            return name
        number, _, rest = name.removeprefix(f"{TEXT}layers.").partition(".")
        stack = next(each for each in reversed(self.stacks) if each.first <= int(number))
        ffn = stack.ffn if rest.startswith("mlp.") else ""
        return f"{stack.place}{int(number) - stack.first}.{ffn}{rest}"


def is_headless(config: PreTrainedConfig, names: Iterable[str]) -> bool:
    """Whether a checkpoint of tensors of these names is an encoder without what makes logits of its
    hidden states, as it is stored for what is built on these."""
    tied = config.tie_word_embeddings
    return is_encoder(config) and not tied and not any(name.endswith(HEAD) for name in names)


@dataclass(frozen=True)
class _Counted:
    """One of several stacks."""

    place: str
    """What the names of its layers begin with, before their numbers."""
    first: int
    """Its first layer among those of all stacks."""
    ffn: str
    """What the names of a host's experts begin with in a layer."""


def _counted(config: PreTrainedConfig, stacks: Iterable[Stack]) -> Iterator[_Counted]:
    first = 0
    for stack in stacks:
        yield _Counted(f"{stack.module}.{stack.layers}.", first, stack.ffn)
        first += getattr(config, stack.count)


def _short(name: str, place: str, text: frozenset[str]) -> str:
    short = TEXT + name.removeprefix(place)
    return short if name.startswith(place) and short in text else name


def _whole(config: PreTrainedConfig) -> PreTrainedModel:
    """The whole model on the meta device."""
    with blaming("transformers can't build a model from config.json"), torch.device("meta"):
        auto = AutoModelForImageTextToText
        model: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
    return model
