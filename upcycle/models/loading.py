"""A checkpoint as a model of transformers, whole in memory."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModel, GenerationConfig, modeling_utils

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import blaming
from upcycle.models.config import read_config, read_text_config
from upcycle.models.config_fields import check_layers
from upcycle.models.families import auto_class, is_encoder
from upcycle.models.layout import is_headless
from upcycle.models.names import KEY_MAPPING
from upcycle.models.shards import TensorInfo, read_headers
from upcycle.models.weights import read_tensors

GENERATION = "generation_config.json"


def kind_of(folder: Path) -> str:
    """What the model in a folder predicts: no token, the next of a second text, or the next."""
    config = read_config(folder)
    if is_encoder(config):
        return "an encoder"
    return "an encoder-decoder" if config.is_encoder_decoder else "a decoder"


def check_decoder(label: str, folder: Path) -> None:
    """Of what is measured or learnt by the next token.

    Raises:
        UpcycleError: the model in the folder is an encoder, whose tokens see the next one.
    """
    if is_encoder(read_config(folder)):
        raise UpcycleError(
            f"{label} is an encoder, whose tokens see the next one, so there is none to predict: "
            "train it on the task that it is for; `upcycle eval` compares its hidden states"
        )


def check_asked(label: str, folder: Path, *, speed: bool, tasks: bool) -> None:
    """Of what is measured of models that go on from a text alone.

    Raises:
        UpcycleError: the model in the folder is an encoder-decoder, and it is asked for.
    """
    asked = [flag for flag, on in (("`speed`", speed), ("`tasks`", tasks)) if on]
    if asked and read_config(folder).is_encoder_decoder:
        raise UpcycleError(
            f"{asked[0]}: {label} is an encoder-decoder, of which upcycle measures perplexity "
            "and routing alone: leave it out"
        )


def check_trainable(label: str, folder: Path) -> None:
    """Raises:
    UpcycleError: the model in the folder is an encoder-decoder, whose data are pairs of texts.
    """
    if read_config(folder).is_encoder_decoder:
        raise UpcycleError(
            f"{label} is an encoder-decoder, whose data are pairs of texts: train it with "
            "transformers' Seq2SeqTrainer, and add a balancing loss on its routers' logits"
        )


def load_whole(folder: Path, **settings: Any) -> Any:
    """What `from_pretrained` returns for a folder. Quantised weights are dequantised on the way,
    one at a time and as a conversion reads them, and need none of their kernels.

    Args:
        settings: of `from_pretrained`; `dtype` is among them.

    Raises:
        Exception: as transformers does.
    """
    settings |= {"local_files_only": True, "key_mapping": KEY_MAPPING}
    config, state = read_config(folder), _deferred(folder)
    auto = AutoModel if is_headless(config, read_headers(folder)) else auto_class(config)
    if not state:
        with _reading_whole():
            return auto.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, **settings
            )
    if (folder / GENERATION).is_file():
        settings["generation_config"] = GenerationConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = type(auto.from_config(config, trust_remote_code=False))
    return model.from_pretrained(None, config=config, state_dict=state, **settings)


@dataclass(frozen=True)
class _Deferred:
    """A quantised tensor as transformers asks for a part of a file: read when it is indexed."""

    folder: Path
    info: TensorInfo

    def __getitem__(self, part: Any) -> Tensor:
        ((_, tensor, _),) = read_tensors(self.folder, {self.info.name: self.info})
        return tensor[part]


def _deferred(folder: Path) -> dict[str, _Deferred]:
    """The tensors of a checkpoint of which some are quantised; none of any other, which
    transformers reads itself."""
    tensors = read_headers(folder)
    if all(info.packed is None for info in tensors.values()):
        return {}
    return {name: _Deferred(folder, info) for name, info in tensors.items()}


@contextmanager
def _reading_whole() -> Iterator[None]:
    """Within it, transformers reads a checkpoint into memory. It maps the files otherwise, and as
    long as the model lives, one that changes changes the weights, and one that is cut short ends
    the process without a word."""
    modeling_utils.safe_open = _Unmapped
    try:
        yield
    finally:
        modeling_utils.safe_open = safe_open


class _Unmapped:
    """`safe_open` as transformers calls it, but for how the bytes are read."""

    def __init__(self, path: Any, **settings: Any) -> None:
        self.shard: Any = safe_open(path, **settings | {"backend": "pread"})

    def __enter__(self) -> "_Unmapped":
        return self

    def __exit__(self, *error: Any) -> None:
        self.shard.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shard, name)

    def get_slice(self, name: str) -> Any:
        part = self.shard.get_slice(name)
        # safetensors 0.8 refuses to read no bytes of a slice.
        return part if math.prod(part.get_shape()) else self.shard.get_tensor(name)


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The checkpoint by plain transformers.

    Raises:
        UpcycleError: it does not load, or not every tensor finds its place.
    """
    check_layers(read_text_config(folder).num_hidden_layers, len(read_headers(folder)), folder)
    with warnings.catch_warnings():
        # A target that always has a shared expert holds one of no neurons.
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        with blaming(f"{folder} does not load in transformers"):
            model, info = load_whole(folder, dtype=dtype, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise UpcycleError(f"{folder} does not load whole: {kind} {sorted(info[kind])[:3]}")
    return model.to(device).eval()
