"""A plug-in with the parameters that a request chose."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import first_problem
from upcycle.core.registry import Method, Params, Registry, check_parameters
from upcycle.core.settings import Choice

M = TypeVar("M", bound=Method[Any])


@dataclass(frozen=True)
class Bound(Generic[M]):
    """A method with its parameters."""

    method: M
    params: Params

    @property
    def name(self) -> str:
        return self.method.name

    def run(self, *arguments: Any) -> Any:
        return self.method.run(*arguments)


def bind(registry: Registry[M], choice: Choice) -> Bound[M]:
    """The method of this name, with the parameters that were chosen.

    Raises:
        UpcycleError: there is none, it needs an extra that is not installed, or a parameter is
            unknown or out of range.
    """
    method = registry[choice.name]
    named = f"{registry.kind} {choice.name!r}"
    if method.extra is not None and find_spec(method.extra[0]) is None:
        raise UpcycleError(f"{named} needs `pip install upcycle[{method.extra[1]}]`")
    check_parameters(named, choice.params, method.params.model_fields)
    try:
        return Bound(method, method.params(**choice.params))
    except ValidationError as error:
        raise UpcycleError(f"{named}: {first_problem(error)}") from error
