"""Named plug-ins: what a method is called, which paper it follows, which parameters it takes."""

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NotRequired, TypedDict, TypeVar

from pydantic import BaseModel, ConfigDict

from upcycle.core.errors import UpcycleError

T = TypeVar("T")
F = TypeVar("F")
Function = TypeVar("Function")


class Params(BaseModel):
    """Base of every method's parameters; the plain class is a method that takes none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def needs_gradients(self) -> bool:
        """Whether the method, with these, looks at the loss's gradients."""
        return False


@dataclass(frozen=True)
class Method(Generic[F]):
    """A plug-in function together with what people need to know about it."""

    name: str
    summary: str
    paper: str
    run: F
    needs_activations: bool
    params: type[Params] = Params
    extra: tuple[str, str] | None = None
    """A module that it imports and that is not always there, and upcycle's extra that installs it.
    """


class About(TypedDict):
    """What the author of a plug-in says of it."""

    summary: str
    paper: str
    params: NotRequired[type[Params]]
    extra: NotRequired[tuple[str, str]]


class Registry(Mapping[str, T], Generic[T]):
    """Plug-ins of one kind by name; a miss says which names there are."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise UpcycleError(f"unknown {self.kind} {name!r}{suggest(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def check_parameters(method: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise if a method, by kind and name, is given a parameter that it has not.

    Raises:
        UpcycleError: the sentence names those that it has.
    """
    for name in given:
        if name not in known:
            hint = suggest(name, known) if known else "; it has none"
            raise UpcycleError(f"{method} has no parameter {name!r}{hint}")


def registering(
    registry: Registry[Any], entry: Callable[..., Any], **fields: Any
) -> Callable[[Function], Function]:
    """A decorator that registers a function and returns it as it is.

    Args:
        entry: makes the `Method` of a kind from its fields; `run` is the function, or what the
            field `adapt` makes of it.
    """
    adapt = fields.pop("adapt", lambda function: function)

    def register(function: Function) -> Function:
        registry.add(fields["name"], entry(run=adapt(function), **fields))
        return function

    return register


def describe(registries: Iterable[Registry[Any]]) -> list[dict[str, Any]]:
    """Every method of some kinds, with its parameters and their defaults: rows of a catalogue."""
    return [
        {
            "kind": registry.kind,
            "name": method.name,
            "summary": method.summary,
            "paper": method.paper,
            "parameters": method.params().model_dump(),
            "needs_text": method.needs_activations,
            "needs_gradients": method.params().needs_gradients,
        }
        for registry in registries
        for method in registry.values()
    ]


def suggest(name: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest known one, then all of them."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f", did you mean {nearest[0]!r}?" if nearest else ";"
    return f"{hint} known: {', '.join(names)}"
