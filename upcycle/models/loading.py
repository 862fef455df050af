"""A checkpoint as a model of transformers, whole in memory."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig

from upcycle.models.names import KEY_MAPPING
from upcycle.models.source import deferred, read_config, reading_whole
from upcycle.models.stream import skeleton

GENERATION = "generation_config.json"


def load_whole(folder: Path, **settings: Any) -> Any:
    """What `from_pretrained` returns for a folder. Quantised weights are dequantised on the way,
    one at a time and as a conversion reads them, and need none of their kernels.

    Args:
        settings: of `from_pretrained`; `dtype` is among them.

    Raises:
        Exception: as transformers does.
    """
    settings |= {"local_files_only": True, "key_mapping": KEY_MAPPING}
    state = deferred(folder)
    if not state:
        with reading_whole():
            return AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, **settings
            )
    config = read_config(folder)
    if (folder / GENERATION).is_file():
        settings["generation_config"] = GenerationConfig.from_pretrained(folder)
    model = type(skeleton(config))
    return model.from_pretrained(None, config=config, state_dict=state, **settings)
