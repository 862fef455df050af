"""What a request asks for: the methods that it names, and the errors about them."""

from typing import Any

from pydantic import ValidationError

from upcycle.conversion.compensate import COMPENSATIONS
from upcycle.conversion.recipe import Choice, Recipe
from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import first_problem
from upcycle.core.registry import Method, Params, Registry, check_parameters, suggest
from upcycle.core.types import sampled
from upcycle.models.source import DenseSource
from upcycle.models.text import check_text, texts
from upcycle.router_init import ROUTERS
from upcycle.split import SPLITS
from upcycle.split.copies import PERTURBS
from upcycle.split.shared import SHARED


def parameters(registry: Registry[Method[Any]], choice: Choice) -> Params:
    """A method's parameters, checked.

    Raises:
        UpcycleError: a parameter is unknown or out of range.
    """
    method = registry[choice.name]
    named = f"{registry.kind} {choice.name!r}"
    check_parameters(named, choice.params, method.params.model_fields)
    try:
        return method.params(**choice.params)
    except ValidationError as error:
        raise UpcycleError(f"{named}: {first_problem(error)}") from error


def router_choice(recipe: Recipe) -> Choice:
    """The router that the recipe names, or the default one."""
    if recipe.router is not None:
        return recipe.router
    return Choice(name="membership" if recipe.prunes else "normal" if recipe.copies else "ridge")


def router_method(recipe: Recipe) -> Method[Any]:
    return ROUTERS[router_choice(recipe).name]


def check_methods(recipe: Recipe) -> None:
    """Every method exists, takes its parameters, and goes with the others.

    Raises:
        UpcycleError: one does not.
    """
    if recipe.method.name not in ("split", "prune", "copy"):
        if recipe.method.name not in PERTURBS:
            names = ["split", "prune", "copy", *PERTURBS]
            raise UpcycleError(
                f"unknown method {recipe.method.name!r}{suggest(recipe.method.name, names)}"
            )
        parameters(PERTURBS, recipe.method)
    parameters(SPLITS, recipe.split)
    parameters(SHARED, recipe.shared_by)
    parameters(COMPENSATIONS, recipe.compensate)
    parameters(ROUTERS, router_choice(recipe))
    if not recipe.splits:
        _check_alike(recipe)
    if recipe.spread_gain and not recipe.copies:
        raise UpcycleError("spread_gain goes with copies: a split and pruned copies are refit")
    if recipe.copies:
        _check_copies(recipe)
    elif recipe.granularity != 1:
        raise UpcycleError(
            f"--granularity {recipe.granularity} goes with copies: for a split, raise --experts"
        )
    if recipe.prunes and recipe.top_k not in (None, 1):
        raise UpcycleError(
            f"--top-k {recipe.top_k} goes with a split or copies: a token takes one pruned copy, "
            "which stands for the whole FFN"
        )


def _check_alike(recipe: Recipe) -> None:
    """Of experts that are all the same when the router is made."""
    if not router_method(recipe).tells_copies_apart:
        fitting = " or ".join(name for name, r in ROUTERS.items() if r.tells_copies_apart)
        raise UpcycleError(
            f"--router {router_method(recipe).name} has nothing to tell copies apart by: "
            f"use {fitting}"
        )
    if recipe.shared:
        raise UpcycleError(f"--shared {recipe.shared:g} goes with a split: copies have none")


def _check_copies(recipe: Recipe) -> None:
    if recipe.compensate.name != "none":
        raise UpcycleError(
            f"--compensate {recipe.compensate.name} goes with a split: copies lose nothing"
        )
    if recipe.active is not None:
        raise UpcycleError(
            f"--active {recipe.active:g} goes with a split: for copies, give --top-k"
        )
    if recipe.keep_dense == "auto":
        raise UpcycleError("--keep-dense auto goes with a split: copies do no damage")


def named_dense_layers(recipe: Recipe, source: DenseSource) -> tuple[int, ...]:
    """The layers that the request keeps dense; none while they are yet to be measured.

    Raises:
        UpcycleError: the model has no such layer, or no other.
    """
    layers = source.arch.num_layers
    if recipe.keep_dense == "auto":
        return ()
    for layer in recipe.keep_dense:
        if layer >= layers:
            raise UpcycleError(
                f"--keep-dense names layer {layer}, but {source.label} has layers 0 to {layers - 1}"
            )
    if len(recipe.keep_dense) == layers:
        raise UpcycleError("--keep-dense names every layer, which leaves nothing to convert")
    return recipe.keep_dense


def check_calibration(recipe: Recipe, *, streams: bool) -> None:
    """There is text where it is needed, as far as can be known without reading it.

    Args:
        streams: whether the conversion looks at activations.

    Raises:
        UpcycleError: there is none.
    """
    if recipe.calibration == "none":
        if streams:
            raise UpcycleError(
                "--calibration none: this conversion needs text for its router "
                f"({router_choice(recipe).name}, {recipe.method.name})"
            )
        if recipe.check != "none":
            raise UpcycleError("--calibration none leaves no text for the check: add --check none")
    names = texts(recipe.calibration)
    for name in names:
        check_text(name)
        if name == "none" and len(names) > 1:
            raise UpcycleError("--calibration none can't be joined with another text")


def check_tokens(recipe: Recipe, tokens: int, experts: int) -> None:
    """Every method sees at least one token per expert, which is what clustering needs.

    Args:
        tokens: that are streamed.
        experts: the most that can come to be routed.

    Raises:
        UpcycleError: there are too few.
    """
    if tokens < experts:
        raise UpcycleError(
            f"--calibration-tokens {recipe.calibration_tokens} is too few for "
            f"{experts} experts: give thousands"
        )
    used: list[tuple[str, Params]] = [("router", parameters(ROUTERS, router_choice(recipe)))]
    if recipe.splits:
        used.append(("split", parameters(SPLITS, recipe.split)))
        used.append(("shared_by", parameters(SHARED, recipe.shared_by)))
    for name, params in used:
        wanted = getattr(params, "tokens", tokens)
        seen = sampled(tokens, wanted)
        if seen < experts:
            raise UpcycleError(
                f"{name}.tokens={wanted} looks at {seen} of {tokens} calibration tokens, too few "
                f"for {experts} experts: give thousands"
            )
