"""A checkpoint's config.json, as transformers understands it."""

from pathlib import Path

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import blaming, read_object
from upcycle.models.config_fields import check_fields
from upcycle.models.families.base import unsupported_reason
from upcycle.models.quantised import packing, quantization_of


def read_config(folder: Path) -> PreTrainedConfig:
    """config.json as transformers understands it; of a quantised model, that of the model which it
    is dequantised to.

    Raises:
        UpcycleError: it is missing, not JSON, not a config that transformers knows, or of weights
            that can't be dequantised.
    """
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not path.is_file():
        raise UpcycleError(
            f"{folder} holds a low-rank adapter, no model: "
            "`upcycle finetune --merge` writes a model instead"
        )
    if not path.is_file():
        raise UpcycleError(f"{folder} holds no config.json, so it is not a model folder")
    fields = read_object(path)
    if "model_type" not in fields:
        raise UpcycleError(f"{path} has no model_type, so it is not a transformers model")
    check_fields(fields, path)
    if fields["model_type"] not in CONFIG_MAPPING:
        raise UpcycleError(
            f"{path} is not a config that transformers reads: "
            f"{unsupported_reason(fields['model_type'])}"
        )
    quantization = quantization_of(fields)
    if quantization is not None:
        packing(quantization, str(path))
    if isinstance(fields.get("text_config"), dict):
        check_fields({"model_type": ""} | fields["text_config"], path)
    with blaming(f"{path} is not a config that transformers reads"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def read_text_config(folder: Path) -> PreTrainedConfig:
    """The same of its text model, where it has other parts, too."""
    return read_config(folder).get_text_config()
