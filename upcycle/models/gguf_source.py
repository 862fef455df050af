"""GGUF files as folders that transformers loads: all that is in one is understood, or refused.

What llama.cpp's converter did to the checkpoint is undone. (transformers reads these files itself,
but passes over keys and tensors that it does not know, and fills what is missing at random.)
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from upcycle.core.errors import UpcycleError
from upcycle.models.families import FAMILIES
from upcycle.models.families.base import unsupported_reason
from upcycle.models.frontmatter import write_gguf_card
from upcycle.models.gguf_file import GgufFile, Metadata, open_gguf, some
from upcycle.models.gguf_rope import TABLES, rope_fields
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


def unpack(label: str, path: Path, folder: Path, accept: Callable[[PreTrainedConfig], Any]) -> None:
    """Write the file that a path names, or is a part of, to a folder, in float32.

    Args:
        accept: may raise on the config before weights are read.

    Raises:
        UpcycleError: a part, key or tensor is missing or not understood.
    """
    file = open_gguf(label, path)
    config = config_of(file)
    accept(config)
    names = tensor_names(file, config)
    config.save_pretrained(folder)
    _write(file, config, names, folder)
    place = {"pretrained_model_name_or_path": file.path.parent, "gguf_file": file.path.name}
    tokenizer = AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    write_gguf_card({key: field.contents() for key, field in file.fields.items()}, folder)


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
        shape = tuple(int(size) for size in reversed(file.tensors[stored].shape))
        if shape != shapes[name]:
            raise UpcycleError(
                f"{stored} in {file.label} has shape {list(shape)}, but its metadata asks for "
                f"{list(shapes[name])}"
            )
    return names


def _write(
    file: GgufFile, config: PreTrainedConfig, names: Mapping[str, str], folder: Path
) -> None:
    """A safetensors file per layer, and per tensor of none: no more is in memory at a time."""
    groups: dict[str, list[str]] = {}
    for stored in names:
        match = LAYER.match(stored)
        groups.setdefault(match[0] if match else stored, []).append(stored)
    places: dict[str, str] = {}
    for group, members in groups.items():
        state = {names[stored]: _restored(file, stored, config) for stored in members}
        place = f"{group.rstrip('.')}.safetensors"
        try:
            save_file(state, folder / place, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise UpcycleError(
                f"{file.label} can't be dequantised to {folder.parent}: {error}; TMPDIR names "
                "another folder with room for its weights in float32"
            ) from error
        places |= dict.fromkeys(state, place)
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(index, encoding="utf-8")


def _restored(file: GgufFile, stored: str, config: PreTrainedConfig) -> Tensor:
    """A tensor as transformers has it. llama.cpp takes the rows of q and k in a llama from the two
    halves of each head in turn."""
    tensor = file.numbers(stored)
    match = QUERY_OR_KEY.fullmatch(stored)
    if match is None or file.architecture != "llama":
        return tensor
    heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
    in_order: Tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)
    return in_order
