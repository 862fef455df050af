"""A finished merge that gets an expert more: what it holds, and what of that grows."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle.conversion.merging.addition import (
    Addition,
    merge_part,
    merged_record,
    texts_of_others,
)
from upcycle.conversion.merging.request import Expert, Merge
from upcycle.conversion.merging.sources import Sources
from upcycle.core.errors import UpcycleError
from upcycle.core.paths import local_path
from upcycle.core.types import all_finite
from upcycle.models.assemble import FFN, name_in_whole
from upcycle.models.checkpoint import Checkpoint, locate
from upcycle.models.config import read_config
from upcycle.models.download import Remote
from upcycle.models.model_name import ModelName, Place, parse_model
from upcycle.models.record.file import DOMAINS, RECORD, Made
from upcycle.models.record.merging import ExpertPart
from upcycle.models.shards import TensorInfo
from upcycle.models.source import DenseSource
from upcycle.models.targets import MoESpec, MoETarget
from upcycle.models.weights import hash_tensors, read_tensors
from upcycle.models.writer import TensorSpec


@dataclass(frozen=True)
class Weights:
    """The tensors of a merge, by their names on the disk, which are read when asked for."""

    label: str
    folder: Path
    tensors: Mapping[str, TensorInfo]
    remote: Remote | None = field(default=None, repr=False)
    """Those of a hub id that are not in `folder` before `fetch`."""
    domains: Remote | None = field(default=None, repr=False)
    """What gate `domain` left, if that is not there before either."""
    unbounded: Collection[str] = ()
    """Names of those that may hold infinity."""
    digests: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Of their bytes, once `fingerprint` has looked at them."""

    def fetch(self) -> None:
        """Download what is not here."""
        if self.remote is not None:
            self.remote.fetch()
        if self.domains is not None:
            self.domains.fetch({DOMAINS})

    def read(self, name: str) -> Tensor:
        """A tensor.

        Raises:
            UpcycleError: it can't be read, holds NaN or infinity, or has changed.
        """
        ((_, tensor, digest),) = read_tensors(self.folder, {name: self.tensors[name]})
        if self.digests.get(name, digest) != digest:
            raise UpcycleError(f"{name} in {self.label} changed while it was read: start anew")
        if name not in self.unbounded and not all_finite(tensor):
            raise UpcycleError(f"{name} in {self.label} holds NaN or infinity")
        return tensor

    def fingerprint(self) -> str:
        """Of all that is copied: config.json, the weights, what is kept beside them."""
        if not self.digests:
            files = {info.file for info in self.tensors.values()}
            self.digests.update(hash_tensors(self.folder, files))
        digest = hashlib.sha256(json.dumps(self.digests, sort_keys=True).encode())
        for name in ("config.json", RECORD, DOMAINS):
            path = self.folder / name
            digest.update(path.read_bytes() if path.is_file() else b"")
        return digest.hexdigest()


@dataclass(frozen=True)
class Finished:
    """A finished merge, whose tensors are copied as they are."""

    request: Addition
    record: Made
    weights: Weights

    @property
    def label(self) -> str:
        return self.request.merge

    @property
    def folder(self) -> Path:
        return self.weights.folder

    @property
    def num_experts(self) -> int:
        """That it has."""
        return self.record.plan.experts

    @property
    def unknown(self) -> list[int]:
        """The experts of which there is neither text nor a prompt."""
        texts = self.texts
        experts = enumerate(merge_part(self.record).experts)
        return [i for i, expert in experts if not (expert.prompts or texts[i])]

    @property
    def texts(self) -> list[str | None]:
        """Of the experts that it has, as far as they are known."""
        return texts_of_others(self.request, self.record)

    def grows(self, spec: TensorSpec) -> bool:
        """Whether a tensor of the result holds one expert's part more than the merge's own, or is
        a new one."""
        info = self.weights.tensors.get(spec.name)
        return info is None or info.shape != spec.shape

    def check_layout(self, specs: Sequence[TensorSpec]) -> None:
        """It holds these tensors and no others.

        Raises:
            UpcycleError: it does not.
        """
        found = {name: (info.shape, info.dtype) for name, info in self.weights.tensors.items()}
        meant = {spec.name: (spec.shape, spec.dtype) for spec in specs}
        if found != meant:
            name = min(name for name, _ in found.items() ^ meant.items())
            raise UpcycleError(
                f"{self.label} does not hold the tensors that its upcycle.json means, such as "
                f"{name}: `add` takes a merge as upcycle wrote it"
            )

    def spec(self, after: MoESpec) -> MoESpec:
        """What it is, in place of what the result is."""
        plan = self.record.plan
        geometry = replace(after.geometry, num_experts=plan.experts, top_k=plan.top_k)
        return replace(after, geometry=geometry)

    def copied(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, Tensor]]:
        """The tensors that stay as they are, one at a time."""
        for spec in specs:
            if not self.grows(spec):
                yield spec.name, self.weights.read(spec.name)

    def grown(
        self, specs: Sequence[TensorSpec], parts: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors that an expert more makes longer, and those that it brings.

        Args:
            parts: what the target makes of a layer in which every expert is the new one.
        """
        for spec in filter(self.grows, specs):
            made = parts[spec.name]
            if spec.name in self.weights.tensors:
                old = self.weights.read(spec.name)
                place = next(i for i, size in enumerate(old.shape) if size != spec.shape[i])
                added = made.narrow(place, self.num_experts, 1).to(old.dtype)
                made = torch.cat([old, added], place)
            yield spec.name, made

    def read_rest(
        self, base: DenseSource, target: MoETarget, names: list[str]
    ) -> dict[str, Tensor]:
        """The base's tensors with this merge's values in all but the FFNs, where the base stores
        them as llama does or joined; else its own (norms less one, channels in another order)."""
        found = base.read(names)
        for name, tensor in found.items():
            theirs = self._values(base, target, name, tensor)
            if theirs is not None:
                found[name] = theirs.to(tensor.dtype)
        return found

    def _values(
        self, base: DenseSource, target: MoETarget, name: str, tensor: Tensor
    ) -> Tensor | None:
        parts = base.canonical({name: tensor})
        short = [part.split(".", 3)[-1] if ".layers." in part else part for part in parts]
        joined = torch.cat(list(parts.values()))
        if set(short) & set(FFN) or not torch.equal(joined, tensor):
            return None
        places = [
            name_in_whole(target, base.layout, part.removesuffix(s) + target.spelled.get(s, s))
            for part, s in zip(parts, short, strict=True)
        ]
        if not self.weights.tensors.keys() >= set(places):
            return None
        return torch.cat([self.weights.read(place) for place in places])

    def config(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
        """Its config.json with what one expert more changes.

        Args:
            before, after: what upcycle writes of both.
        """
        fields = json.loads((self.folder / "config.json").read_text("utf-8"))
        changed = {name: value for name, value in after.items() if before.get(name) != value}
        # Of a whole model, the text model's fields lie below.
        fields.get("text_config", fields).update(changed)
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def open_finished(request: Addition) -> tuple[Checkpoint, Made]:
    """The folder and the record of a merge.

    Raises:
        UpcycleError: it is not there, or is no merge.
    """
    found = locate(request.merge, None)
    if found is None:
        raise UpcycleError(f"{request.merge} is a file: `add` takes what `upcycle merge` wrote")
    return found, merged_record(found.folder, request.merge)


def base_of(request: Addition, record: Made, folder: Path) -> ModelName:
    """The base of a merge, where it lies now.

    Raises:
        UpcycleError: it is not where it was.
    """
    if request.base is not None:
        return parse_model(request.base)
    name = record.source.model(folder)
    if name is None:
        raise UpcycleError(
            f"{request.merge} was merged with the base {record.source.name}, which is not there "
            "now: say where it lies by `base`"
        )
    return ModelName(Place(name, record.source.revision))


def with_others(added: Sources, finished: Finished) -> Sources:
    """The models of the merge with the new one as its last expert. Those of the others are not
    read, so the base stands for them.

    Args:
        added: the base and the new model.
    """
    part = merge_part(finished.record)
    others = tuple(map(_expert, part.experts, finished.texts))
    shared = _expert(part.shared, None) if part.shared else None
    merge = Merge(added.merge.base, (*others, *added.merge.experts), shared)
    stand_ins = (added.base,) * len(others)
    models = (*stand_ins, *added.models, *([added.base] if shared else []))
    return Sources(merge, added.base, models, added.notes)


def _expert(part: ExpertPart, text: str | None) -> Expert:
    return Expert(
        parse_model(part.model),
        tuple(part.prompts),
        tuple(part.negatives),
        part.noise_scale,
        part.residual_scale,
        text,
    )


def weights_of(request: Addition, found: Checkpoint, base: DenseSource, router: str) -> Weights:
    """The tensors of a merge; reads headers now.

    Args:
        router: what makes the new row. Gate `domain` makes it by what it left beside the merge.

    Raises:
        UpcycleError: that is not there.
    """
    read_config(found.folder)
    domains = _domains(request.merge, found.folder) if router == "domain" else None
    # Of the base's parts beside its text model some have bounds that are infinite.
    bounds = base.parts
    return Weights(request.merge, found.folder, found.headers(), found.remote, domains, bounds)


def _domains(merge: str, folder: Path) -> Remote | None:
    """Where on the hub what gate `domain` left is; None if it is in the folder."""
    if (folder / DOMAINS).is_file():
        return None
    remote = Remote(merge, folder.name, {})
    if local_path(merge).is_dir() or not remote.holds(DOMAINS):
        raise UpcycleError(
            f"{merge} holds no {DOMAINS}, by which router domain makes a row: give `router=text`"
        )
    return remote


def check_base(base: DenseSource, finished: Finished) -> None:
    """The base is the one that the merge was made with; reads all of it.

    Raises:
        UpcycleError: it is another.
    """
    wanted = finished.record.source.fingerprint
    if wanted is not None and base.fingerprint() != wanted:
        raise UpcycleError(
            f"{base.label} is not the base that {finished.label} was merged with, but another: "
            "name that by `base`"
        )
