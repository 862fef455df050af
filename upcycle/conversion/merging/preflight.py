"""A merge's request, with all that shows to be wrong with it before torch is imported."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from upcycle.conversion.catalogue import check_names
from upcycle.conversion.merging.addition import Addition, addition_request
from upcycle.conversion.merging.mergekit_file import read_file
from upcycle.conversion.merging.request import (
    Expert,
    Request,
    check_prompts,
    check_request,
    named_request,
    place_of_file,
    recipe_settings,
)
from upcycle.conversion.recipe import load_recipe
from upcycle.core.errors import UpcycleError
from upcycle.models.text import PROBES, check_text


def merge_request(
    models: Sequence[str | Path],
    given: Mapping[str, Any],
    *,
    base: str | None = None,
    shared_model: str | None = None,
    texts: Mapping[str, str] | None = None,
    add: str | None = None,
    prompts: Sequence[str] = (),
) -> Request | Addition:
    """What a command line or a call asks for.

    Args:
        models: the experts', or the path of a mergekit-moe file alone; with `add`, a finished
            merge.
        given: fields of the recipe.
        base, shared_model: of experts that are named.
        texts: files of text, by the names of experts' models; that of the one that is added by no
            name, too.
        add: a model that becomes an expert more of a finished merge.
        prompts: of that.

    Raises:
        UpcycleError: a name, a field or a setting is wrong.
    """
    names = [str(model) for model in models]
    if add is not None:
        return addition_request(
            names,
            add,
            given,
            base=base,
            shared_model=shared_model,
            texts=texts,
            prompts=tuple(prompts),
        )
    if prompts:
        raise UpcycleError(
            f"`prompts={prompts[0]!r}` is of an expert that `add` adds: name the prompts of all "
            "experts in a mergekit-moe file"
        )
    file = place_of_file(names)
    if file is None:
        request = named_request(names, base=base, shared_model=shared_model)
    elif base is not None or shared_model is not None:
        raise UpcycleError(
            f"{file} names the base and the shared experts: drop `base` and `shared_model`"
        )
    else:
        request = read_file(file)
    request = _with_texts(request, texts or {})
    check_request(request)
    recipe = load_recipe("default", recipe_settings(request, given))
    try:
        check_prompts(request.merge, recipe.router_name)
    except UpcycleError as error:
        raise UpcycleError(f"{file}: {error}" if file else str(error)) from error
    targets_later = {} if recipe.target != request.settings.get("target") else {"target": "auto"}
    check_names(recipe.model_copy(update=targets_later))
    return request


def _with_texts(request: Request, texts: Mapping[str, str]) -> Request:
    """The request, its experts with their text.

    Raises:
        UpcycleError: a name is no expert's or several experts', or a text is not there.
    """
    experts = list(request.merge.experts)
    for name, text in texts.items():
        if not name:
            raise UpcycleError(f"`text={text}`: say whose it is, MODEL={text}")
        if text in ("probes", *PROBES):
            raise UpcycleError(f"`text={name}={text}`: nothing is ever fitted on probes")
        check_text(text, "text")
        places = [i for i, expert in enumerate(experts) if name in _names(expert)]
        if len(places) != 1:
            known = ", ".join(str(expert.model) for expert in experts)
            many = "several experts" if places else "no expert"
            raise UpcycleError(f"`text={name}={text}`: {name} names {many} of {known}")
        experts[places[0]] = replace(experts[places[0]], text=text)
    merge = replace(request.merge, experts=tuple(experts))
    return replace(request, merge=merge)


def _names(expert: Expert) -> set[str]:
    """What an expert may be called: as it was named, or by the last part of that."""
    name = str(expert.model)
    return {name, Path(expert.model.model.path).name if expert.model.adapter is None else name}
