"""What a merge is made of: the base, the experts' models, and what each is chosen by.

Without torch: what is wrong with a request is said before it is imported.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.models.model_name import ModelName, check_name, parse_model
from upcycle.models.record.file import TEXTUAL

PROMPTED = ("hidden", "hidden_avg", "hidden_last", "cheap_embed")
"""Routers whose rows are made from prompts."""
FIXED = {
    "method": "it is one",
    "experts": "it has as many as models are named",
    "shared": "`shared_model` names the model that is always on",
}
"""Fields of a recipe that the models decide, and what decides them."""
RANDOM = ("random", "uniform_random", "normal")
"""Routers that know nothing of the experts."""


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert of every layer: whose FFN it is, and what it is chosen by."""

    model: ModelName
    prompts: tuple[str, ...] = ()
    """Text that should be its."""
    negatives: tuple[str, ...] = ()
    """Text that should not be."""
    noise_scale: float = 0.0
    """Standard deviation of what is added to all its weights."""
    residual_scale: float = 1.0
    """Factor on its output."""
    text: str | None = None
    """The name of a text that should be its."""

    @property
    def plain(self) -> bool:
        """Whether its FFN is the model's as it is."""
        return self.noise_scale == 0 and self.residual_scale == 1


@dataclass(frozen=True, slots=True)
class Merge:
    """The models and what becomes of each; the rest of a request is a `Recipe`."""

    base: ModelName
    """Gives all that is no FFN, the tokenizer and the config."""
    experts: tuple[Expert, ...]
    shared: Expert | None = None
    """Always on, beside the experts that are chosen."""

    @property
    def all(self) -> tuple[Expert, ...]:
        """The experts, and the shared one last."""
        return (*self.experts, *([self.shared] if self.shared else []))

    @property
    def texts(self) -> list[str]:
        """The names of the experts' texts, each once."""
        return list(dict.fromkeys(expert.text for expert in self.experts if expert.text))

    @property
    def copies_base(self) -> bool:
        """Whether every expert is the base's own FFN, so that any mean of them is, too."""
        return self.shared is None and all(
            expert.plain and expert.model.same(self.base) for expert in self.experts
        )

    @property
    def one_model(self) -> bool:
        """Whether all experts are equal."""
        first = self.experts[0]
        scales = {(expert.noise_scale, expert.residual_scale) for expert in self.experts}
        same = all(expert.model.same(first.model) for expert in self.experts)
        return same and len(scales) == 1 and not first.noise_scale

    def gates_shared(self, router: str) -> bool:
        """Whether the shared expert has a gate with a row of its own, from its prompts."""
        return self.shared is not None and bool(self.shared.prompts) and router in PROMPTED

    def settings(self) -> dict[str, Any]:
        """Plain values, of which any change is another merge."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Request:
    """A merge, what else was asked for, and what of that has no effect."""

    merge: Merge
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a recipe."""
    notes: tuple[str, ...] = ()


def named_request(
    models: Sequence[str], *, base: str | None = None, shared_model: str | None = None
) -> Request:
    """The request of a command line or a call that names the experts' models.

    Args:
        base: by default the first of them.

    Raises:
        UpcycleError: none is named, or a name is of no model.
    """
    if not models:
        raise UpcycleError("name a mergekit-moe file, or the models that are to be experts")
    experts = tuple(Expert(parse_model(name)) for name in models)
    shared = None if shared_model is None else Expert(parse_model(shared_model))
    notes: tuple[str, ...] = ()
    if base is None:
        first = ModelName(experts[0].model.model)
        notes = (
            f"all that is no FFN comes from {first.public}, the first model: `base` names another",
        )
    merge = Merge(first if base is None else parse_model(base), experts, shared)
    return Request(merge, {"name": "merge"}, notes)


def recipe_settings(request: Request, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the recipe that carries a request out, with those that were given besides.

    Raises:
        UpcycleError: more experts are to be on than there are, or the router has no prompts.
    """
    merge = request.merge
    count = len(merge.experts)
    for name, instead in FIXED.items():
        if given.get(name) is not None:
            raise UpcycleError(f"{setting(name, given[name])} is not for a merge: {instead}")
    settings = {**request.settings, **{k: v for k, v in given.items() if v is not None}}
    if given.get("router") is None and any(expert.text for expert in merge.experts):
        settings["router"] = "text"
    top_k = settings.get("top_k")
    if isinstance(top_k, int) and top_k > count:
        raise UpcycleError(
            f"{top_k} experts per token are asked for, but the merge has {count}: give at most "
            f"{count}"
        )
    fixed = {"method": "merge", "experts": count, "allow_frozen_router": True}
    if merge.shared is not None:
        fixed["shared"] = 1.0
    return {"calibration": "builtin", "keep_dense": "none"} | settings | fixed


def check_prompts(merge: Merge, router: str) -> None:
    """There are prompts, and they tell the experts apart, where the router is made from them.

    Raises:
        UpcycleError: an expert has none, or all have the same.
    """
    if router in TEXTUAL:
        _check_texts(merge, router)
    if router not in PROMPTED:
        return
    bare = [f"{number} ({expert.model})" for number, expert in _unprompted(merge)]
    if bare:
        nor = "".join(f", nor has expert {name}" for name in bare[1:])
        raise UpcycleError(
            f"expert {bare[0]} has no prompts{nor}, and router {router} needs them: add "
            "positive_prompts in a mergekit-moe file, or `router=random`"
        )
    texts = {(expert.prompts, expert.negatives) for expert in merge.experts}
    if len(merge.experts) > 1 and len(texts) == 1:
        raise UpcycleError(
            f"all {len(merge.experts)} experts have the same prompts, so {router} would give them "
            "equal rows: give each its own, or `router=random`"
        )


def _check_texts(merge: Merge, router: str) -> None:
    for number, expert in enumerate(merge.experts):
        if not expert.prompts and expert.text is None:
            raise UpcycleError(
                f"expert {number} ({expert.model}) has neither text nor prompts, and router "
                f"{router} needs them: add `text={expert.model}=FILE`, or `router=random`"
            )


def _unprompted(merge: Merge) -> Iterator[tuple[int, Expert]]:
    return ((i, expert) for i, expert in enumerate(merge.experts) if not expert.prompts)


def check_request(request: Request) -> None:
    """Raise what is wrong with the names of models.

    Raises:
        UpcycleError: one is neither here nor, by its form, on the hub.
    """
    if request.merge.base.adapter is not None:
        raise UpcycleError(
            f"the base {request.merge.base} has an adapter, which would change the rest: merge it "
            "into a folder first, or name it at the experts"
        )
    check_name(request.merge.base)
    for expert in request.merge.all:
        check_name(expert.model)


def place_of_file(models: Sequence[str]) -> Path | None:
    """The mergekit-moe file that a command line names in place of models, if it does.

    Raises:
        UpcycleError: models are named beside it.
    """
    files = [name for name in models if Path(name).suffix.lower() in (".yml", ".yaml")]
    if not files:
        return None
    if len(models) > 1:
        raise UpcycleError(f"{files[0]} says what to merge: name it alone, without models")
    return Path(files[0])
