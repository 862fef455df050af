"""GGUF files as folders that transformers loads: all that is in one is understood, or refused.

What llama.cpp's converter did to the checkpoint is undone. (transformers reads these files itself,
but passes over keys and tensors that it does not know, and fills what is missing at random.)
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    TOKENIZER_MAPPING,
    PreTrainedConfig,
    TokenizersBackend,
)

from upcycle.core.errors import UpcycleError
from upcycle.models.families import FAMILIES
from upcycle.models.families.base import unsupported_reason
from upcycle.models.frontmatter import write_gguf_card
from upcycle.models.gguf_file import GgufFile, Metadata, open_gguf, some
from upcycle.models.gguf_rope import TABLES, rope_fields
from upcycle.models.quantised import LINK, Packed, Part
from upcycle.models.stream import skeleton

ARCHITECTURES = ("llama", "phi3", "qwen2", "qwen3")
HEAD = "output.weight"
TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
LAYER = re.compile(r"blk\.(\d+)\.")
QUERY_OR_KEY = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")


def prepare(
    label: str, path: Path, folder: Path, accept: Callable[[PreTrainedConfig], Any]
) -> None:
    """Make a folder as a checkpoint of the file that a path names or is a part of: with its config,
    its tokenizer, and a link to it in the place of weights.

    Args:
        accept: may raise on the config.

    Raises:
        UpcycleError: a part, key or tensor is missing or not understood.
    """
    file = open_gguf(label, path)
    config = config_of(file)
    accept(config)
    tensor_names(file, config)
    file.check_types()
    config.save_pretrained(folder)
    (folder / LINK).symlink_to(file.path.absolute())
    place = {"pretrained_model_name_or_path": file.path.parent, "gguf_file": file.path.name}
    # AutoTokenizer would read the file once more for a config, by a reader that takes seconds.
    kind = TOKENIZER_MAPPING.get(type(config), TokenizersBackend)
    tokenizer = kind.from_pretrained(**place, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    write_gguf_card({key: field.contents() for key, field in file.fields.items()}, folder)


def gguf_tensors(link: Path, config: PreTrainedConfig) -> dict[str, Packed]:
    """The tensors of the file behind a link that `prepare` made, by transformers' names."""
    file = open_gguf(str(link.readlink()), link.readlink())
    return {
        name: Packed(
            {"": Part(stored, LINK, file.shape(stored), file.tensors[stored].tensor_type.name)},
            file.shape(stored),
            partial(_restored, file, stored, config),
        )
        for stored, name in tensor_names(file, config).items()
    }


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
    _check_kind(file)
    meta = Metadata(file)
    hidden, heads = meta.number("embedding_length"), meta.number("attention.head_count")
    fields = {
        "vocab_size": meta.number("vocab_size", _vocabulary(file)),
        "hidden_size": hidden,
        "intermediate_size": meta.number("feed_forward_length"),
        "num_hidden_layers": meta.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.number("attention.head_count_kv", heads),
        "head_dim": meta.number("attention.key_length", hidden // heads),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": meta.number("context_length"),
        "tie_word_embeddings": HEAD not in file.tensors,
        "dtype": "float32",
    }
    fields |= {name: file.value(key) for name, key in TOKENS.items()}
    fields |= _switches(file, meta)
    _check_values(file, meta, fields["head_dim"])
    fields |= rope_fields(file, meta, fields["head_dim"], fields["max_position_embeddings"])
    meta.refuse_rest()
    _check_layers(file, fields["num_hidden_layers"])
    config: PreTrainedConfig = CONFIG_MAPPING[file.architecture](**fields)
    return config


def _check_kind(file: GgufFile) -> None:
    kind = file.value("general.type") or "model"
    if kind != "model":
        raise UpcycleError(f"{file.label} holds no model: general.type is {kind}")
    if file.architecture in ARCHITECTURES:
        return
    if file.architecture in FAMILIES:
        raise UpcycleError(
            f"{file.label} is of the architecture {file.architecture}, which upcycle does not read "
            f"from GGUF files ({', '.join(ARCHITECTURES)} it does): give its safetensors"
        )
    raise UpcycleError(f"{file.label}: {unsupported_reason(file.architecture)}")


def _vocabulary(file: GgufFile) -> int | None:
    tokens = file.fields.get("tokenizer.ggml.tokens")
    return None if tokens is None else len(tokens.data)


def _switches(file: GgufFile, meta: Metadata) -> dict[str, Any]:
    """Config fields of the biases, which the tensors tell, and of the window."""
    fields: dict[str, Any] = {}
    if file.architecture in ("llama", "qwen3"):
        fields["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if file.architecture == "llama":
        fields["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if file.architecture == "phi3":
        fields["sliding_window"] = meta.take("attention.sliding_window") or None
    return fields


def _check_values(file: GgufFile, meta: Metadata, head_dim: int) -> None:
    size = meta.number("attention.value_length", head_dim)
    if size != head_dim:
        raise UpcycleError(
            f"{file.label} has keys of {head_dim} and values of {size} channels per head, which no "
            "native MoE has"
        )


def _check_layers(file: GgufFile, layers: int) -> None:
    """Before a model of so many layers is built."""
    found = {match[1] for match in map(LAYER.match, file.tensors) if match}
    if layers > len(found):
        raise UpcycleError(
            f"{file.label} lacks blk.{len(found)}.*: it holds {len(found)} of the {layers} layers "
            "that its metadata asks for"
        )


def tensor_names(file: GgufFile, config: PreTrainedConfig) -> dict[str, str]:
    """The tensors' names in transformers by their names in the file; without `TABLES`.

    Raises:
        UpcycleError: a tensor is missing, has another shape, or is not understood.
    """
    architecture = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    shapes = {name: tuple(t.shape) for name, t in skeleton(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    names = {str(table.get_name(name, (".weight", ".bias"))): name for name in shapes}
    if missing := sorted(names.keys() - file.tensors.keys()):
        raise UpcycleError(
            f"{file.label} lacks {some(missing)}, which its metadata asks for: it is not whole"
        )
    if unknown := sorted(file.tensors.keys() - names.keys() - set(TABLES)):
        raise UpcycleError(
            f"{file.label} holds {some(unknown)}, which {file.architecture} does not have: it "
            "would be lost"
        )
    for stored, name in names.items():
        shape = file.shape(stored)
        if shape != shapes[name]:
            raise UpcycleError(
                f"{stored} in {file.label} has shape {list(shape)}, but its metadata asks for "
                f"{list(shapes[name])}"
            )
    return names


def _restored(
    file: GgufFile, name: str, config: PreTrainedConfig, parts: Mapping[str, Tensor]
) -> Tensor:
    """A tensor as transformers has it. llama.cpp takes the rows of q and k in a llama from the two
    halves of each head in turn."""
    tensor = file.numbers(name, parts[""])
    match = QUERY_OR_KEY.fullmatch(name)
    if match is None or file.architecture != "llama":
        return tensor
    heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
    in_order: Tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
    return in_order
