"""What can be wrong with a request: the layers, the text and the tokens that it names."""

from collections.abc import Mapping
from typing import Any

from upcycle.conversion.design import Methods
from upcycle.conversion.recipe import Recipe
from upcycle.core.binding import Bound
from upcycle.core.errors import UpcycleError
from upcycle.core.types import sampled
from upcycle.models.source import DenseSource
from upcycle.models.text import check_text, texts


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
                f"`keep_dense` names layer {layer}, but {source.label} has layers 0 to {layers - 1}"
            )
        if layer not in source.arch.ffn_layers:
            raise UpcycleError(f"`keep_dense` names layer {layer}, which has no FFN to keep dense")
    if len(recipe.keep_dense) == len(source.arch.ffn_layers):
        raise UpcycleError("`keep_dense` names every layer, which leaves nothing to convert")
    return recipe.keep_dense


def suited(recipe: Recipe, source: DenseSource, *, merges: bool) -> Recipe:
    """What is asked; of an encoder, without what it takes predictions of the next token to know.

    Raises:
        UpcycleError: it is asked for what only a decoder does.
    """
    if source.arch.goes_on:
        return recipe
    kind = "encoder" if source.arch.encoder else "encoder-decoder"
    if merges:
        raise UpcycleError(
            f"{source.label} is an {kind}, and a merge's gates and check are of decoders: convert "
            "it alone"
        )
    if "self" in texts(recipe.calibration):
        why = "no text" if source.arch.encoder else "no text unasked"
        raise UpcycleError(
            f"`calibration={recipe.calibration}`: {source.label} is an {kind}, which writes {why}: "
            "give builtin or a file"
        )
    if not source.arch.encoder:
        return recipe
    chosen = () if recipe.keep_dense == "auto" else recipe.keep_dense
    return recipe.model_copy(update={"keep_dense": chosen})


def check_calibration(recipe: Recipe, methods: Methods, *, streams: bool) -> None:
    """There is text where it is needed, as far as can be known without reading it.

    Args:
        streams: whether the conversion looks at activations.

    Raises:
        UpcycleError: there is none.
    """
    if recipe.calibration == "none":
        if streams:
            raise UpcycleError(
                "`calibration=none`: this conversion needs text for its router "
                f"({methods.router.name}, {recipe.method.name})"
            )
        if recipe.check != "none":
            raise UpcycleError("`calibration=none` leaves no text for the check: add `check=none`")
    names = texts(recipe.calibration)
    for name in names:
        check_text(name)
        if name == "none" and len(names) > 1:
            raise UpcycleError("`calibration=none` can't be joined with another text")


def check_tokens(recipe: Recipe, used: Mapping[str, Bound[Any]], tokens: int, experts: int) -> None:
    """Every method sees at least one token per expert, which is what clustering needs.

    Args:
        used: the methods, by the field of the recipe that names them.
        tokens: that are streamed.
        experts: the most that can come to be routed.

    Raises:
        UpcycleError: there are too few.
    """
    if tokens < experts:
        raise UpcycleError(
            f"`calibration_tokens={recipe.calibration_tokens}` is too few for "
            f"{experts} experts: give thousands"
        )
    for field, bound in used.items():
        wanted = getattr(bound.params, "tokens", tokens)
        seen = sampled(tokens, wanted)
        if seen < experts:
            raise UpcycleError(
                f"{field}.tokens={wanted} looks at {seen} of {tokens} calibration tokens, too few "
                f"for {experts} experts: give thousands"
            )
