"""Low-rank adapters of peft: W + s B A, from their folder.

What changes a weight otherwise (DoRA, biases, whole matrices) is refused where it is asked for.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, PositiveInt, ValidationError
from torch import Tensor

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import first_problem, read_json
from upcycle.core.paths import local_path
from upcycle.core.types import all_finite
from upcycle.models.adapter import CONFIG
from upcycle.models.download import asking_hub
from upcycle.models.model_name import Place
from upcycle.models.shards import reading
from upcycle.models.weights import hash_tensors

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.lora_[AB]\.weight")
VARIANTS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "fan_in_fan_out"),
    *("kasa_config", "monteclora_config", "arrow_config", "alora_invocation_tokens"),
)
"""Fields of adapters that are more than W + s B A."""


class LoraFields(BaseModel):
    """What of adapter_config.json says what a change counts."""

    model_config = ConfigDict(extra="allow")

    peft_type: str
    base_model_name_or_path: str | None = None
    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8
    use_rslora: bool = False
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None

    def rank(self, module: str) -> int:
        return int(_of_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """The factor s of a module's change, as peft has it."""
        rank = self.rank(module)
        alpha = _of_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _of_pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """What a pattern says of a module: the value of the first key that its name ends in."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


@dataclass(frozen=True)
class Adapter:
    """A LoRA, whose factors are read when asked for."""

    label: str
    folder: Path
    fields: LoraFields
    stored: Mapping[str, str]
    """The names in the file of all its tensors, by the names of the model's modules in front."""
    shapes: Mapping[str, tuple[int, ...]]
    digests: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def modules(self) -> frozenset[str]:
        """Whose weights it changes."""
        found = (FACTOR.fullmatch(name) for name in self.stored)
        return frozenset(match["module"] for match in found if match)

    @property
    def others(self) -> list[str]:
        """Its tensors that are no low-rank factors."""
        return [name for name in self.stored if FACTOR.fullmatch(name) is None]

    def known_as(self, known: Callable[[str], str]) -> "Adapter":
        """The same with its modules under other names.

        Args:
            known: of a tensor's name in the model, what it is known by.
        """

        def renamed(name: str) -> str:
            found = FACTOR.fullmatch(name)
            if found is None:
                return known(name)
            weight = known(f"{found['module']}.weight")
            return weight.removesuffix(".weight") + name.removeprefix(found["module"])

        names = {name: renamed(name) for name in self.stored}
        return replace(
            self,
            stored={names[name]: old for name, old in self.stored.items()},
            shapes={names[name]: shape for name, shape in self.shapes.items()},
        )

    def fingerprint(self) -> str:
        """Of its settings and factors; where its model lies is none of them."""
        digests = sorted(hash_tensors(self.folder, [WEIGHTS]).items())
        fields = self.fields.model_dump_json(exclude={"base_model_name_or_path"})
        return hashlib.sha256(repr((digests, fields)).encode()).hexdigest()

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise unless it fits a weight that it changes.

        Args:
            name: of the module.
            shape: of its weight.

        Raises:
            UpcycleError: a factor is missing, or of another shape.
        """
        rank = self.fields.rank(name)
        for factor, wanted in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
            full = f"{name}.lora_{factor}.weight"
            if full not in self.stored:
                raise UpcycleError(f"the adapter {self.label} lacks {full}")
            if self.shapes[full] != wanted:
                raise UpcycleError(
                    f"the adapter {self.label} was made for another model: {full} is "
                    f"{list(self.shapes[full])}, where {list(wanted)} is needed"
                )

    def changed(self, module: str, weight_OI: Tensor) -> Tensor:
        """A module's weight with its change, in float32; the weight itself, if there is none.

        Raises:
            UpcycleError: a factor can't be read, or holds NaN or infinity.
        """
        if module not in self.modules:
            return weight_OI
        down_RI, up_OR = (self._factor(f"{module}.lora_{factor}.weight") for factor in "AB")
        return weight_OI.float() + self.fields.scale(module) * (up_OR @ down_RI)

    def _factor(self, name: str) -> Tensor:
        with reading(self.folder / WEIGHTS) as file:
            factor: Tensor = file.get_tensor(self.stored[name]).float()
        if not all_finite(factor):
            raise UpcycleError(f"{name} in {self.folder / WEIGHTS} holds NaN or infinity")
        return factor


def open_adapter(place: Place) -> Adapter:
    """The adapter in a folder or on the hub; reads no factors.

    Raises:
        UpcycleError: it is not there, is whole in no safetensors file, or is no plain LoRA.
    """
    folder = local_path(place.path) if place.here else _download(place)
    path = folder / CONFIG
    if not path.is_file():
        raise UpcycleError(f"{place} holds no {CONFIG}, so it is no adapter")
    if not (folder / WEIGHTS).is_file():
        raise UpcycleError(f"{place} holds no {WEIGHTS}: save the adapter as safetensors")
    fields = _fields(path)
    with reading(folder / WEIGHTS) as file:
        stored = {_module_name(name): name for name in file.keys()}  # noqa: SIM118 (not a dict)
        shapes = {n: tuple(file.get_slice(old).get_shape()) for n, old in stored.items()}
    return Adapter(str(place), folder, fields, stored, shapes)


def _fields(path: Path) -> LoraFields:
    found: Any = read_json(path)
    try:
        fields = LoraFields.model_validate(found)
    except ValidationError as error:
        raise UpcycleError(f"{path} is not an adapter's: {first_problem(error)}") from error
    if fields.peft_type != "LORA":
        raise UpcycleError(
            f"{path} is of a {fields.peft_type} adapter, and only LORA is known: merge it into its "
            "model first"
        )
    for name in VARIANTS:
        if found.get(name):
            raise UpcycleError(
                f"{path} sets {name}, which makes it more than W + s B A: merge it into its model "
                "first"
            )
    return fields


def _module_name(stored: str) -> str:
    """A tensor's name with the model's own name of its module; an adapter of a model without its
    head leaves out where that lies."""
    name = stored.removeprefix(PREFIX)
    return f"model.{name}" if name.startswith("layers.") else name


def _download(place: Place) -> Path:
    from huggingface_hub import snapshot_download

    with asking_hub(place.path, place.revision):
        files = [CONFIG, WEIGHTS]
        return Path(snapshot_download(place.path, revision=place.revision, allow_patterns=files))
