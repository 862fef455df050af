"""A checkpoint as a model of transformers, whole in memory."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, GenerationConfig

from upcycle.core.errors import UpcycleError
from upcycle.models.families import auto_class, is_encoder
from upcycle.models.names import KEY_MAPPING
from upcycle.models.source import deferred, is_headless, read_config, read_headers, reading_whole

GENERATION = "generation_config.json"


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
    config, state = read_config(folder), deferred(folder)
    auto = AutoModel if is_headless(config, read_headers(folder)) else auto_class(config)
    if not state:
        with reading_whole():
            return auto.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, **settings
            )
    if (folder / GENERATION).is_file():
        settings["generation_config"] = GenerationConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = type(auto.from_config(config, trust_remote_code=False))
    return model.from_pretrained(None, config=config, state_dict=state, **settings)
