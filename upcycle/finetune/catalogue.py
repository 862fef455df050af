"""The plug-ins of training that a request may name.

Without torch, which they need when they run: what is to be known of them beforehand lies in
catalogue.json, which `make catalogue` writes from the registries.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, NonNegativeFloat

from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.registry import check_parameters, suggest
from upcycle.core.settings import Choice, as_choice

CATALOGUE = "catalogue.json"
OF_FLAGS = ("balance", "z_loss")
"""Losses of routers whose weights are settings of their own."""


class Weighed(BaseModel):
    """A weight, and the parameters of what is weighed."""

    model_config = ConfigDict(frozen=True, extra="allow")

    weight: NonNegativeFloat

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def as_weighed(value: Any) -> Any:
    return value if isinstance(value, Mapping | Weighed) else {"weight": value}


RouterLosses = Mapping[str, Annotated[Weighed, BeforeValidator(as_weighed)]]


def methods() -> list[dict[str, Any]]:
    """Every plug-in of training: kind, name, summary, paper, parameters with their defaults."""
    listed: list[dict[str, Any]] = _catalogue()
    return listed


@cache
def _catalogue() -> Any:
    text = (resources.files("upcycle.finetune") / CATALOGUE).read_text(encoding="utf-8")
    return json.loads(text)


def check_names(gating: Choice | None, router_losses: RouterLosses | None) -> None:
    """Raise if there is no such plug-in or parameter.

    Raises:
        UpcycleError: the sentence names those that there are.
    """
    if gating is not None:
        _check("gating", gating.name, gating.params)
    for name, choice in (router_losses or {}).items():
        if name in OF_FLAGS:
            raise UpcycleError(
                f"`router_losses.{name}` is {setting(name, choice.weight)}: give that instead"
            )
        _check("router loss", name, choice.params)


def _check(kind: str, name: str, params: dict[str, Any]) -> None:
    known = {row["name"]: row["parameters"] for row in methods() if row["kind"] == kind}
    if name not in known:
        raise UpcycleError(f"unknown {kind} {name!r}{suggest(name, set(known) - {*OF_FLAGS})}")
    check_parameters(f"{kind} {name!r}", params, known[name])


def override(fields: dict[str, Any], key: str, value: Any) -> None:
    """Replace a field of a request, or a parameter of one of its plug-ins: `gating.noise`,
    `router_losses.cv2`, `router_losses.erc.alpha`.

    Raises:
        UpcycleError: the field has no parameters.
    """
    name, *path = key.split(".")
    if not path:
        fields[name] = value
    elif name == "gating":
        current = as_choice(fields.get(name))
        if not isinstance(current, dict):
            raise UpcycleError(f"`{key}`: name the gating itself first, by `gating=NAME`")
        fields[name] = current | {path[0]: value}
    elif name == "router_losses" and len(path) < 3:
        losses = dict(fields.get(name) or {})
        one = {"weight": value} if len(path) == 1 else {path[1]: value}
        losses[path[0]] = (as_weighed(losses[path[0]]) if path[0] in losses else {}) | one
        fields[name] = losses
    else:
        raise UpcycleError(
            f"`{key}`: {name!r} has no parameters{suggest(name, ['gating', 'router_losses'])}"
        )
