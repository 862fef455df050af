"""The metadata of a GGUF file: all of it that matters is understood, or the file is refused."""

from typing import Any

import gguf
import numpy as np

from upcycle.core.errors import UpcycleError
from upcycle.models.gguf.file import GgufFile

# Keys that have no effect on the forward pass at this value.
WITHOUT_EFFECT = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_group_count": 1,
    "expert_group_used_count": 1,
    "tensor_data_layout": "Meta AI original pth",
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


class Metadata:
    """The keys of a file's architecture. What is taken is understood; nothing else may be there."""

    def __init__(self, file: GgufFile) -> None:
        self.label, self.prefix = file.label, f"{file.architecture}."
        self.rest = {
            key.removeprefix(self.prefix): _value(field)
            for key, field in file.fields.items()
            if key.startswith(self.prefix)
        }

    def take(self, key: str, default: Any = None) -> Any:
        """What a key says; `default` if it is not there."""
        return self.rest.pop(key, default)

    def number(self, key: str, default: float | None = None) -> Any:
        """The number that a key says; `default` if it is not there.

        Raises:
            UpcycleError: it is not there and has no default, or is no number above zero.
        """
        value = self.take(key, default)
        if value is None:
            raise UpcycleError(f"{self.label} lacks the key {self.prefix}{key}: it is not whole")
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # the same for every layer
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise UpcycleError(
                f"{self.label} sets {self.prefix}{key}={_short(value)}, where upcycle understands "
                "one number above zero"
            )
        return value

    def per_layer(self, key: str, layers: int) -> list[Any]:
        """What a key says of each layer, where it may say one thing of all.

        Raises:
            UpcycleError: it is not there, or says it of fewer layers.
        """
        value = self.take(key)
        if value is None:
            raise UpcycleError(f"{self.label} lacks the key {self.prefix}{key}: it is not whole")
        values = value if isinstance(value, list) else [value] * layers
        if len(values) < layers or not all(isinstance(v, (int, bool)) and v >= 0 for v in values):
            raise UpcycleError(
                f"{self.label} sets {self.prefix}{key}={_short(value)}, where upcycle understands "
                f"one number, or one for each of {layers} layers"
            )
        return values[:layers]

    def refuse_rest(self) -> None:
        """Everything that matters has been taken.

        Raises:
            UpcycleError: a key is left that may change what the model computes.
        """
        for key, value in sorted(self.rest.items()):
            if key in WITHOUT_EFFECT and value == WITHOUT_EFFECT[key]:
                continue
            if key.startswith("expert"):
                raise UpcycleError(
                    f"{self.label} sets {self.prefix}{key}={_short(value)}: the source is a "
                    "Mixture-of-Experts already"
                )
            raise UpcycleError(
                f"{self.label} sets {self.prefix}{key}={_short(value)}, which upcycle does not "
                "understand and which may change what the model computes: give its safetensors"
            )


def _value(field: gguf.ReaderField) -> Any:
    """What a field says; of a float32 the shortest number that is stored so, which is what the
    model's config.json said: 1e-06, not 9.999999974752427e-07."""
    value = field.contents()
    if field.types[-1] != gguf.GGUFValueType.FLOAT32:
        return value
    return [*map(_shortest, value)] if isinstance(value, list) else _shortest(value)


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


def _short(value: Any) -> str:
    return str(value)[:60]
