"""GGUF files as folders that transformers loads: all that is in one is understood, or refused.

What llama.cpp's converter did to the checkpoint is undone. (transformers reads these files itself,
but passes over keys and tensors that it does not know, and fills what is missing at random.)
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    TOKENIZER_MAPPING,
    PreTrainedConfig,
    TokenizersBackend,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from upcycle.core.errors import UpcycleError
from upcycle.models.families.base import unsupported_reason
from upcycle.models.frontmatter import write_gguf_card
from upcycle.models.gguf.architectures import STORED, Stored
from upcycle.models.gguf.file import GgufFile, open_gguf, some
from upcycle.models.gguf.metadata import Metadata
from upcycle.models.gguf.rope import TABLES
from upcycle.models.quantised import LINK, Packed, Part
from upcycle.models.stream import skeleton

LAYER = re.compile(r"blk\.(\d+)\.")
FOLDED = re.compile(r"blk\.\d+\.(ssm|shortconv)")
"""Tensors that llama.cpp stores in another shape, with the same numbers in the same order."""
CALLED = {
    "chatglm": "glm",
    "command-r": "cohere",
    "gemma3": "gemma3_text",
    "gptneox": "gpt_neox",
    "phi2": "phi",
}
"""What transformers calls architectures that are not read."""
UNREAD = {
    "deepseek2": "which holds a latent's keys and values in another way than transformers",
    "glm": "whose text transformers splits in another way than its tokenizer",
}
AS_GPT_2 = set(
    "gpt-2 mpt olmo jais trillion granite-docling phi-2 jina-es jina-de gigachat jina-v2-es "
    "jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code roberta-bpe".split()
)
"""What llama.cpp splits text by as transformers does where it does not know the name."""


def prepare(
    label: str, path: Path, folder: Path, accept: Callable[[PreTrainedConfig], Any]
) -> tuple[str, ...]:
    """Make a folder as a checkpoint of the file that a path names or is a part of: with its config,
    its tokenizer, and a link to it in the place of weights. Returns what is to be said of it.

    Args:
        accept: may raise on the config.

    Raises:
        UpcycleError: a part, key or tensor is missing or not understood.
    """
    file = open_gguf(label, path)
    config = config_of(file)
    accept(config)
    made_tensors(file, config)
    file.check_types()
    config.save_pretrained(folder)
    (folder / LINK).symlink_to(file.path.absolute())
    place = {"pretrained_model_name_or_path": file.path.parent, "gguf_file": file.path.name}
    # AutoTokenizer would read the file once more for a config, by a reader that takes seconds.
    kind = TOKENIZER_MAPPING.get(type(config), TokenizersBackend)
    tokenizer = kind.from_pretrained(**place, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    write_gguf_card({key: field.contents() for key, field in file.fields.items()}, folder)
    return tuple(_of_tokenizer(file))


def _of_tokenizer(file: GgufFile) -> Iterator[str]:
    split = file.value("tokenizer.ggml.pre")
    if split is None or file.value("tokenizer.ggml.model") != "gpt2":
        return
    if split not in AS_GPT_2 | GGUF_PRE_TOKENIZER_SPLITS.keys():
        yield (
            f"the file says tokenizer.ggml.pre={split}, for which transformers splits text as "
            "GPT-2 does: some text may become other tokens than in llama.cpp"
        )


def gguf_tensors(link: Path, config: PreTrainedConfig) -> dict[str, Packed]:
    """The tensors of the file behind a link that `prepare` made, by transformers' names."""
    file = open_gguf(str(link.readlink()), link.readlink())
    return {
        name: Packed(
            {key: _part(file, stored) for key, stored in made.keys.items()},
            made.shape,
            partial(_restored, file, made, config),
        )
        for name, made in made_tensors(file, config).items()
    }


def _part(file: GgufFile, stored: str) -> Part:
    return Part(stored, LINK, file.shape(stored), file.tensors[stored].tensor_type.name)


class GgufShard:
    """The file behind a link, as safetensors has its own."""

    def __init__(self, link: Path) -> None:
        self.file = open_gguf(str(link.readlink()), link.readlink())

    def get_tensor(self, name: str) -> Tensor:
        return self.file.stored(name)

    def digests(self) -> dict[str, str]:
        return {name: self.file.digest(name) for name in self.file.tensors}


def config_of(file: GgufFile) -> PreTrainedConfig:
    """The config that the metadata describes.

    Raises:
        UpcycleError: a key is missing or not understood.
    """
    stored = _kind(file)
    meta = Metadata(file)
    fields = stored.fields(file, meta)
    meta.refuse_rest()
    _check_layers(file, fields["num_hidden_layers"])
    config: PreTrainedConfig = CONFIG_MAPPING[stored.model_type](**fields)
    return config


def _kind(file: GgufFile) -> Stored:
    kind = file.value("general.type") or "model"
    if kind != "model":
        raise UpcycleError(f"{file.label} holds no model: general.type is {kind}")
    if file.architecture in STORED:
        return STORED[file.architecture]
    if file.value(f"{file.architecture}.expert_count"):
        raise UpcycleError(f"{file.label} is of a Mixture-of-Experts already")
    family = CALLED.get(file.architecture, file.architecture)
    if family in UNREAD:
        raise UpcycleError(
            f"{file.label} is of the architecture {file.architecture}, {UNREAD[family]}: give its "
            "safetensors"
        )
    raise UpcycleError(f"{file.label}: {unsupported_reason(family)}")


def _check_layers(file: GgufFile, layers: int) -> None:
    """Before a model of so many layers is built."""
    found = {match[1] for match in map(LAYER.match, file.tensors) if match}
    if layers > len(found):
        raise UpcycleError(
            f"{file.label} lacks blk.{len(found)}.*: it holds {len(found)} of the {layers} layers "
            "that its metadata asks for"
        )


@dataclass(frozen=True)
class Made:
    """A tensor of transformers."""

    shape: tuple[int, ...]
    stored: tuple[str, ...]
    """The names in the file of what holds its rows, one after the other."""

    @property
    def keys(self) -> dict[str, str]:
        return {"": self.stored[0]} if len(self.stored) == 1 else {n: n for n in self.stored}


def made_tensors(file: GgufFile, config: PreTrainedConfig) -> dict[str, Made]:
    """What the file holds but for `TABLES`, by the names that transformers has for it.

    Raises:
        UpcycleError: a tensor is missing, has another shape, or is not understood.
    """
    shapes = {name: tuple(t.shape) for name, t in skeleton(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    made = {name: Made(shape, _names(file, name, config)) for name, shape in shapes.items()}
    beside = {n: stored for stored, n in _family(file).beside(config).items() if stored in file}
    made |= {name: Made(file.shape(stored), (stored,)) for name, stored in beside.items()}
    asked = {part for one in made.values() for part in one.stored}
    if missing := sorted(asked - file.tensors.keys()):
        raise UpcycleError(
            f"{file.label} lacks {some(missing)}, which its metadata asks for: it is not whole"
        )
    if unknown := sorted(file.tensors.keys() - asked - set(TABLES)):
        raise UpcycleError(
            f"{file.label} holds {some(unknown)}, which {file.architecture} does not have: it "
            "would be lost"
        )
    for one in made.values():
        _check_shape(file, one)
    return made


def _family(file: GgufFile) -> Stored:
    return STORED[file.architecture]


def _names(file: GgufFile, name: str, config: PreTrainedConfig) -> tuple[str, ...]:
    table = _table(file.architecture, config.num_hidden_layers)
    ends = (".weight", ".bias")
    return tuple(str(table.get_name(part, ends)) for part in _family(file).spelled(name))


@lru_cache(maxsize=2)
def _table(architecture: str, layers: int) -> gguf.TensorNameMap:
    number = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, layers)


def _check_shape(file: GgufFile, made: Made) -> None:
    first, *others = (file.shape(part) for part in made.stored)
    shape = (first[0] + sum(other[0] for other in others), *first[1:])
    folded = FOLDED.match(made.stored[0]) and math.prod(shape) == math.prod(made.shape)
    if shape != made.shape and not folded:
        raise UpcycleError(
            f"{some(list(made.stored))} in {file.label} has shape {list(shape)}, but its metadata "
            f"asks for {list(made.shape)}"
        )


def _restored(
    file: GgufFile, made: Made, config: PreTrainedConfig, parts: Mapping[str, Tensor]
) -> Tensor:
    """A tensor as transformers has it."""
    family = _family(file)
    pieces = [
        family.restored(name, file.numbers(name, parts[key]), config)
        for key, name in made.keys.items()
    ]
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return whole.reshape(made.shape)
