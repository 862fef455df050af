"""The plug-ins of training that a request may name.

Without torch, which they need when they run: what is to be known of them beforehand lies in
catalogue.json, which `make catalogue` writes from the registries.
"""

import json
from functools import cache
from importlib import resources
from typing import Any

from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.registry import check_parameters, suggest
from upcycle.core.settings import Choice, WeighedPlugIns

CATALOGUE = "catalogue.json"
OF_FLAGS = ("balance", "z_loss")
"""Losses of routers whose weights are settings of their own."""


def methods() -> list[dict[str, Any]]:
    """Every plug-in of training: kind, name, summary, paper, parameters with their defaults."""
    listed: list[dict[str, Any]] = _catalogue()
    return listed


@cache
def _catalogue() -> Any:
    text = (resources.files("upcycle.finetune") / CATALOGUE).read_text(encoding="utf-8")
    return json.loads(text)


def check_names(gating: Choice | None, router_losses: WeighedPlugIns | None) -> None:
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
