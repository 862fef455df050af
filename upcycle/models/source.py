"""A dense checkpoint: its architecture, its tensors by name, and their values when asked for."""

import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.core.errors import UpcycleError
from upcycle.core.types import all_finite
from upcycle.models.download import Remote
from upcycle.models.families import FAMILIES
from upcycle.models.layout import Layout
from upcycle.models.shards import DTYPES, TensorInfo
from upcycle.models.traits import Architecture
from upcycle.models.weights import digests_of, fingerprint_of, read_tensors

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class DenseSource:
    """A dense checkpoint whose tensors are read when asked for."""

    label: str
    """As the user named it."""
    folder: Path
    config: PreTrainedConfig
    """Of the text model."""
    arch: Architecture
    tensors: Mapping[str, TensorInfo]
    """By the names that transformers has for them; those of a text model that has other parts
    beside it, by the names that they have without these."""
    layout: Layout
    parts: frozenset[str]
    """Names of the tensors that are not the text model's."""
    notes: tuple[str, ...] = ()
    """What is not as config.json says."""
    revision: str | None = None
    """The commit of a hub id."""
    remote: Remote | None = field(default=None, repr=False)
    """The weights of a hub id that are not in `folder` before `fetch`."""
    temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)
    """Holds the config and tokenizer of a GGUF file for as long as the source lives."""
    digests: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Of every tensor's bytes, once `fingerprint` has looked at them: what is read later must be
    the same."""

    def fetch(self) -> None:
        """Download the weights if they are not here; to be called before any are read.

        Raises:
            UpcycleError: the hub does not give them.
        """
        if self.remote is not None:
            self.remote.fetch()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; where there are several, the one that transformers loads them all in."""
        if self.config.dtype in DTYPES.values() and len(self.dtypes) > 1:
            dtype: torch.dtype = self.config.dtype
            return dtype
        return next(iter(self.dtypes))

    @cached_property
    def dtypes(self) -> dict[torch.dtype, int]:
        """How many weights each dtype has, that of the most first."""
        weights: Counter[torch.dtype] = Counter()
        for info in self.tensors.values():
            weights[info.dtype] += math.prod(info.shape)
        return dict(weights.most_common())

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """These tensors, in memory of their own: a mapped file that is cut short would end the
        process.

        Raises:
            UpcycleError: a tensor holds NaN or infinity, can't be read, or has changed.
        """
        found = {}
        asked = {name: self.tensors[name] for name in names}
        for name, tensor, digest in read_tensors(self.folder, asked):
            # What is not converted may have bounds that are infinite.
            if name not in self.parts and not all_finite(tensor):
                raise UpcycleError(f"{name} in {self.tensors[name].file} holds NaN or infinity")
            self._compare(name, digest)
            found[name] = tensor
        return found

    def _compare(self, name: str, digest: str) -> None:
        if self.digests.get(name, digest) != digest:
            raise UpcycleError(
                f"{name} in {self.folder / self.tensors[name].file} changed while it was read: "
                "leave the source as it is, and start anew"
            )

    def verify(self) -> None:
        """Read all bytes again, as a check does that others do the reading for.

        Raises:
            UpcycleError: they are no longer those of `fingerprint`.
        """
        for name, digest in digests_of(self.folder, self.tensors).items():
            self._compare(name, digest)

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """A layer's tensors by their names below `model.layers.N.`, as the source spells them."""
        return self.read_place(f"model.layers.{layer}.", self.layer_names(layer))

    def read_place(self, place: str, names: list[str]) -> dict[str, Tensor]:
        """These tensors by their names below `place`, which they all begin with."""
        return {name.removeprefix(place): tensor for name, tensor in self.read(names).items()}

    def known(self, name: str) -> str:
        """What a tensor is known by here, of its name in the checkpoint or in the whole model."""
        for old, new in FAMILIES[self.arch.family].stored.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        return self.layout.short(name)

    def place(self, layer: int) -> str:
        """What the names of a layer's tensors begin with; layers that draft tokens are counted on
        after the others."""
        drafted = layer - self.arch.num_layers
        return f"model.layers.{layer}." if drafted < 0 else self.drafts[drafted]

    def layer_names(self, layer: int) -> list[str]:
        return [n for n in self.text_names if n.startswith(f"model.layers.{layer}.")]

    def outer_names(self) -> list[str]:
        """Tensors of the text model that belong to no layer."""
        return [n for n in self.text_names if not LAYER.fullmatch(n)]

    @cached_property
    def drafts(self) -> tuple[str, ...]:
        """What the names of the tensors of each layer that drafts tokens begin with."""
        drafts = FAMILIES[self.arch.family].drafts
        if drafts is None:
            return ()
        layers = re.compile(rf"{re.escape(drafts.place)}layers\.\d+\.")
        found = {match[0] for name in self.parts if (match := layers.match(name))}
        return tuple(sorted(found))

    def draft_names(self) -> list[str]:
        """Tensors of what drafts tokens."""
        drafts = FAMILIES[self.arch.family].drafts
        return [n for n in sorted(self.parts) if drafts is not None and n.startswith(drafts.place)]

    @cached_property
    def text_names(self) -> list[str]:
        return [n for n in self.tensors if n not in self.parts]

    def embedding_names(self) -> list[str]:
        """Tensors by which the first hidden states are made of tokens."""
        places = tuple(f"model.{name}." for name in FAMILIES[self.arch.family].blocks.embeddings)
        return [n for n in self.tensors if n.startswith(places)]

    def canonical(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under llama's names."""
        rewrite = FAMILIES[self.arch.family].rewrite
        return {
            new: moved
            for name, tensor in tensors.items()
            for new, moved in rewrite(name, tensor, self.config).items()
        }

    def fingerprint(self) -> str:
        """Of config.json and the tensors with all their bytes; what is read from now on must be
        what was read for it.

        Raises:
            UpcycleError: a file is cut short.
        """
        if not self.digests:
            self.digests.update(digests_of(self.folder, self.tensors))
        return fingerprint_of(self.folder, self.tensors, self.digests)
