"""The models behind a merge: opened once each, compared with the base, read an FFN at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import overload

import torch
from torch import Tensor

from upcycle.conversion.merging.compare import compare, read_tokens
from upcycle.conversion.merging.request import Expert, Merge
from upcycle.core.errors import UpcycleError
from upcycle.core.paths import local_path, public_name
from upcycle.core.types import Activation, DenseFFN
from upcycle.evaluation.distance import Meter
from upcycle.models.assemble import FFN, dense_ffn
from upcycle.models.lora import Adapter, open_adapter
from upcycle.models.model_name import ModelName, Place
from upcycle.models.opening import open_source
from upcycle.models.source import DenseSource
from upcycle.models.weights import fingerprint


@dataclass(frozen=True)
class AdaptedSource(DenseSource):
    """A dense checkpoint with an adapter: what the adapter changes is read changed, in float32."""

    adapter: Adapter = field(kw_only=True)

    @classmethod
    def of(cls, source: DenseSource, adapter: Adapter) -> "AdaptedSource":
        """The source with the adapter; both share what was read for the fingerprint."""
        own = {each.name: getattr(source, each.name) for each in fields(source)}
        own["label"] = f"{source.label}+{adapter.label}"
        return cls(**own, adapter=adapter.known_as(source.known))

    def read(self, names: list[str]) -> dict[str, Tensor]:
        return {
            name: self.adapter.changed(name.removesuffix(".weight"), tensor)
            for name, tensor in super().read(names).items()
        }

    def fingerprint(self) -> str:
        return super().fingerprint() + self.adapter.fingerprint()


def read_ffn(source: DenseSource, place: str, act: Activation) -> DenseFFN:
    """A layer's FFN.

    Args:
        place: what the names of the layer's tensors begin with.

    Raises:
        UpcycleError: a tensor can't be read, holds NaN or infinity, or has changed.
    """
    names = [n for n in source.tensors if n.startswith(place) and is_ffn(source, n)]
    return dense_ffn(source.canonical(source.read_place(place, names)), act)


def is_ffn(source: DenseSource, name: str) -> bool:
    """Whether a layer's tensor is a part of its FFN, by what it becomes under llama's names."""
    short = name.split(".", 3)[-1]
    meta = torch.empty(source.tensors[name].shape, device="meta")
    return bool(source.canonical({short: meta}).keys() & set(FFN))


@dataclass(frozen=True)
class LayerFFNs(Sequence[DenseFFN]):
    """One layer's FFNs of several models, each read when it is asked for and not kept."""

    models: tuple[DenseSource, ...]
    place: str
    """What the names of the layer's tensors begin with."""
    base: DenseFFN
    """The base's, in its dtype; that of a model that lacks the layer, as one that drafts tokens."""
    meter: Meter | None = None
    """Sees every FFN that is read."""

    def __len__(self) -> int:
        return len(self.models)

    @overload
    def __getitem__(self, place: int) -> DenseFFN: ...
    @overload
    def __getitem__(self, place: slice) -> "LayerFFNs": ...
    def __getitem__(self, place: int | slice) -> "DenseFFN | LayerFFNs":
        if isinstance(place, slice):
            return replace(self, models=self.models[place])
        model, base = self.models[place], self.base
        if not any(name.startswith(self.place) for name in model.tensors):
            return base
        ffn = read_ffn(model, self.place, base.act)
        if self.meter is not None:
            for name in base.matrices:
                self.meter.see("ffn", name, model.label, getattr(base, name), getattr(ffn, name))
        return ffn


@dataclass(frozen=True)
class Sources:
    """A merge's models, in the order of its experts, the shared one last."""

    merge: Merge
    base: DenseSource
    models: tuple[DenseSource, ...]
    notes: tuple[str, ...] = ()
    """What is to be known of how they differ."""

    @property
    def routed(self) -> tuple[DenseSource, ...]:
        """Of the experts that the router chooses from."""
        return self.models[: len(self.merge.experts)]

    def ffns(self, layer: int, base: DenseFFN, meter: Meter | None = None) -> LayerFFNs:
        return LayerFFNs(self.models, self.base.place(layer), base, meter)

    @property
    def apart(self) -> dict[str, DenseSource]:
        """Every model once, an adapted one too, but the base; by their names here."""
        found = {model.label: model for model in self.models}
        found.pop(self.base.label, None)
        return found

    def public(self, label: str) -> str:
        """The name by which a model may be published."""
        named = zip(self.models, self.merge.all, strict=True)
        return next(expert.model.public for model, expert in named if model.label == label)

    def meter(self) -> Meter | None:
        """What measures how far the models are from the base; None where all are the base."""
        return Meter(list(self.apart)) if self.apart else None

    def distinct(self) -> list[DenseSource]:
        """Every checkpoint once, but the base."""
        found = {str(model.folder): model for model in self.models}
        found.pop(str(self.base.folder), None)
        return list(found.values())

    def fingerprints(self) -> list[str]:
        """Of every expert's model, in order."""
        known = {model.label: model for model in self.models}
        digests = {label: model.fingerprint() for label, model in known.items()}
        return [digests[model.label] for model in self.models]


def open_sources(merge: Merge, rest: str = "base") -> Sources:
    """Open every model of a merge and compare it with the base; reads headers, no weights.

    Args:
        rest: the name of the rule for all but the FFNs, on which it depends what is not used.

    Raises:
        UpcycleError: one can't be read, or can't be merged with the base.
    """
    opened: dict[tuple[str, str | None], DenseSource] = {}
    adapters: dict[tuple[str, str | None], Adapter] = {}

    def open_model(name: ModelName) -> DenseSource:
        key = name.model.resolved
        if key not in opened:
            opened[key] = _open(name.model)
        if name.adapter is None:
            return opened[key]
        place = name.adapter.resolved
        if place not in adapters:
            adapters[place] = open_adapter(name.adapter)
        return AdaptedSource.of(opened[key], adapters[place])

    base = open_model(merge.base)
    models = tuple(open_model(expert.model) for expert in merge.all)
    tokens = read_tokens(base.folder)
    notes = list(_place_notes(merge))
    for source in opened.values():
        notes += compare(base, tokens, source)
    for model in {model.label: model for model in models}.values():
        if isinstance(model, AdaptedSource):
            check_adapter(model, model.adapter)
            notes += _adapter_notes(model, rest)
    return Sources(merge, base, models, (*notes, *_expert_notes(merge)))


def _open(place: Place) -> DenseSource:
    try:
        return open_source(place.path, revision=None if place.here else place.revision)
    except UpcycleError as error:
        if place.path in str(error):
            raise
        raise UpcycleError(f"{place}: {error}") from error  # of several, which one


def check_adapter(source: DenseSource, adapter: Adapter) -> None:
    """An adapter's changes fit the model, and those of its FFNs are all low-rank.

    Raises:
        UpcycleError: they do not.
    """
    _check_trained_on(source, adapter)
    for module in sorted(adapter.modules):
        info = source.tensors.get(f"{module}.weight")
        if info is None and not (module == "lm_head" and source.arch.tied):
            raise UpcycleError(
                f"the adapter {adapter.label} was made for another model: it changes {module}, "
                f"which {source.label} does not have"
            )
        if info is not None:
            adapter.check(module, info.shape)
    for name in adapter.others:
        if ".mlp." in name or (name in source.tensors and is_ffn(source, name)):
            raise UpcycleError(
                f"the adapter {adapter.label} holds {name}, which is no low-rank factor: merge it "
                "into its model first"
            )


def _check_trained_on(source: DenseSource, adapter: Adapter) -> None:
    """The adapter names no other model, as far as what it names is here."""
    named = adapter.fields.base_model_name_or_path
    if not named or source.revision is not None or source.temporary is not None:
        return
    places = [local_path(named), adapter.folder / named]
    trained_on = next((place for place in places if (place / "config.json").is_file()), None)
    if trained_on is None or trained_on.resolve() == source.folder.resolve():
        return
    if fingerprint(trained_on) != fingerprint(source.folder):
        raise UpcycleError(
            f"the adapter {adapter.label} was made for {named}, not for "
            f"{source.label.removesuffix(f'+{adapter.label}')}: name it as "
            f"{named}+{adapter.label}"
        )


def _place_notes(merge: Merge) -> Iterator[str]:
    for place in {e.model.model: None for e in (Expert(merge.base), *merge.all)}:
        if place.here and place.revision is not None:
            yield f"{place.public} is a folder here, so its revision {place.revision} has no effect"


def _adapter_notes(source: AdaptedSource, rest: str) -> Iterator[str]:
    adapter, name = source.adapter, public_name(source.adapter.label)
    layered = {m for m in adapter.modules if f"{m}.weight" in source.tensors}
    ffn = {module for module in layered if is_ffn(source, f"{module}.weight")}
    if not ffn and rest == "base":
        yield f"the adapter {name} changes no FFN, so it makes no difference to its expert"
    unused = {name.removesuffix(".weight").rpartition(".")[2] for name in adapter.others}
    if rest == "base":
        unused |= {module.rpartition(".")[2] for module in adapter.modules - ffn}
    if unused:
        why = "all that is no FFN comes from the base" if rest == "base" else "it is no low rank"
        yield f"of the adapter {name}, {', '.join(sorted(unused))} is unused: {why}"


def _expert_notes(merge: Merge) -> Iterator[str]:
    """Of experts that are one model, or have the same prompts."""
    if merge.one_model and len(merge.experts) > 1:
        return  # The way says more of that.
    for what, same in (
        ("are one model", lambda a, b: a.model.same(b.model)),
        (
            "have the same prompts, and so equal rows",
            lambda a, b: bool(a.prompts) and (a.prompts, a.negatives) == (b.prompts, b.negatives),
        ),
    ):
        for first, expert in enumerate(merge.experts):
            twins = [i for i, other in enumerate(merge.experts) if same(expert, other)]
            if len(twins) > 1 and twins[0] == first:
                yield f"experts {', '.join(map(str, twins[:-1]))} and {twins[-1]} {what}"
