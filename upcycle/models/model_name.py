"""A model by name: a checkpoint, at a revision, with a low-rank adapter.

Spelt `path[@revision][+adapter[@revision]]`, as mergekit does. Without torch.
"""

from dataclasses import dataclass

from upcycle.core.errors import UpcycleError
from upcycle.core.paths import check_model, local_path, public_name


@dataclass(frozen=True, slots=True)
class Place:
    """A folder, a hub id or a .gguf file, at a revision of the hub's."""

    path: str
    revision: str | None = None

    @property
    def here(self) -> bool:
        """Whether it lies on this machine, where there are no revisions."""
        return local_path(self.path).exists()

    @property
    def resolved(self) -> tuple[str, str | None]:
        """What is the same for two spellings of one place."""
        if self.here:
            return str(local_path(self.path).resolve()), None
        return self.path, self.revision

    @property
    def public(self) -> str:
        """As it may be published: of a local path only the last part."""
        return public_name(self.path) if self.here else str(self)

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


@dataclass(frozen=True, slots=True)
class ModelName:
    """A checkpoint and perhaps an adapter of it."""

    model: Place
    adapter: Place | None = None

    def same(self, other: "ModelName") -> bool:
        """Whether both are one model, whichever way they are spelt."""
        mine, theirs = self.adapter, other.adapter
        if mine is None or theirs is None:
            return mine is theirs and self.model.resolved == other.model.resolved
        return (self.model.resolved, mine.resolved) == (other.model.resolved, theirs.resolved)

    @property
    def public(self) -> str:
        """As it may be published."""
        return self.model.public + (f"+{self.adapter.public}" if self.adapter else "")

    def __str__(self) -> str:
        return str(self.model) if self.adapter is None else f"{self.model}+{self.adapter}"


def parse_model(text: str) -> ModelName:
    """The model that a text names.

    Raises:
        UpcycleError: a part of it is empty.
    """
    if local_path(text).exists():
        return ModelName(Place(text))
    model, plus, adapter = text.partition("+")
    return ModelName(parse_place(model), parse_place(adapter) if plus else None)


def parse_place(text: str) -> Place:
    """The place that `path[@revision]` names; a path that is here may hold an @.

    Raises:
        UpcycleError: there is no path, or nothing after the @.
    """
    path, at, revision = text.rpartition("@")
    if not at or local_path(text).exists():
        path, revision = text, ""
    if not path.strip() or (at and text.endswith("@")):
        raise UpcycleError(f"{text!r} names no model: write path, path@revision or path+adapter")
    return Place(path, revision or None)


def check_name(name: ModelName) -> None:
    """Raise what is wrong with a name that shows without reading what it names.

    Raises:
        UpcycleError: nothing is there, and it is no hub id either.
    """
    check_model(name.model.path)
    if name.adapter is not None:
        check_model(name.adapter.path)
