"""What is asked of an expert that comes later: the finished merge, the model, its text.

Without torch: what is wrong with a request is said before it is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from upcycle.conversion.catalogue import check_names
from upcycle.conversion.merging.request import PROMPTED, RANDOM, Expert
from upcycle.conversion.recipe import Recipe, load_recipe
from upcycle.core.errors import UpcycleError
from upcycle.core.flags import ABOUT, setting
from upcycle.core.paths import check_model, local_path
from upcycle.models.model_name import check_name, parse_model
from upcycle.models.record.file import RECORD, TEXTUAL, Made, read_record
from upcycle.models.record.merging import MergePart
from upcycle.models.text import check_text

NEW = ""
"""As whose a text is given that is the new expert's."""
KEPT = ("rest", "target", "dtype", "experts", "shared", "keep_dense", "method")
"""Fields of the recipe that a finished merge has decided."""


@dataclass(frozen=True)
class Addition:
    """An expert more for a finished merge."""

    merge: str
    """The finished merge: a folder or a hub id."""
    expert: Expert
    texts: Mapping[str, str] = field(default_factory=dict)
    """Texts of experts that it has, by their names or numbers."""
    base: str | None = None
    """Where the merge's base lies now, if not where it did."""


def addition_request(
    models: list[str],
    add: str,
    given: Mapping[str, Any],
    *,
    base: str | None = None,
    shared_model: str | None = None,
    texts: Mapping[str, str] | None = None,
    prompts: tuple[str, ...] = (),
) -> Addition:
    """What a command line or a call asks for, with what shows to be wrong with it.

    Args:
        models: the finished merge alone.
        add: the new expert's model.
        given: fields of the recipe.
        texts: by whose they are: `NEW`, or an expert's name or number.

    Raises:
        UpcycleError: a name, a field or a setting is wrong, or the model is no merge.
    """
    if len(models) != 1:
        raise UpcycleError(f"`add={add}` adds one expert to one merge: name that alone")
    if shared_model is not None:
        raise UpcycleError(
            f"`shared_model={shared_model}` has no effect with `add`: a finished merge keeps its "
            "shared expert"
        )
    named = dict(texts or {})
    for text in named.values():
        check_text(text, "text")
    expert = Expert(parse_model(add), prompts)
    own = [name for name in named if name in (NEW, add, Path(add).name)]
    if len(own) > 1:
        raise UpcycleError(f"`text` names {add} twice: give it one file, or a folder of both")
    if own:
        expert = replace(expert, text=named.pop(own[0]))
    request = Addition(models[0], expert, named, base)
    check_model(request.merge)
    check_name(expert.model)
    if base is not None:
        check_model(base)
    folder = local_path(request.merge)
    if folder.is_dir():
        addition_recipe(request, merged_record(folder, request.merge), given)
    return request


def merged_record(folder: Path, label: str) -> Made:
    """The record of a finished merge.

    Raises:
        UpcycleError: the folder holds none, or one of something else.
    """
    wanted = "`add` takes what `upcycle merge` wrote"
    path = folder / RECORD
    if not path.is_file():
        raise UpcycleError(f"{label} holds no {RECORD}: {wanted}")
    record = read_record(path)
    if not isinstance(record, Made) or record.plan.merge is None:
        how = f"by method {record.plan.method}" if isinstance(record, Made) else "elsewhere"
        raise UpcycleError(f"{label} was made {how} and is no merge of several models: {wanted}")
    return record


def merge_part(record: Made) -> MergePart:
    """The models of a merge, by its record."""
    if record.plan.merge is None:
        raise ValueError("the record is of no merge")
    return record.plan.merge


def addition_recipe(request: Addition, record: Made, given: Mapping[str, Any]) -> Recipe:
    """The recipe of the merge with an expert more: its own, and what is given besides.

    Raises:
        UpcycleError: what is given is decided, or the router lacks or does not take text.
    """
    plan, given = record.plan, {name: value for name, value in given.items() if value is not None}
    before = {n: value for n, value in plan.recipe.plain().items() if n not in ABOUT}
    for name, value in given.items():
        if name.partition(".")[0] in KEPT:
            raise UpcycleError(
                f"{setting(name, value)} has no effect with `add`: {request.merge} has decided that"
            )
    fixed = {
        "target": plan.target,
        "dtype": plan.dtype,
        "experts": plan.experts + 1,
        "top_k": given.get("top_k", plan.top_k),
    }
    here = {"calibration": "builtin", "device": "auto", "check": "fast"}
    recipe = load_recipe("default", before | here | dict(given) | fixed | {"name": "merge"})
    check_names(recipe)
    if recipe.top_k is not None and recipe.top_k > plan.experts + 1:
        raise UpcycleError(
            f"{recipe.top_k} experts per token are asked for, but the merge then has "
            f"{plan.experts + 1}: give at most {plan.experts + 1}"
        )
    texts_of_others(request, record)
    _check_text(request, recipe.router_name, own=given.get("router") is None)
    return recipe


def _check_text(request: Addition, router: str, *, own: bool) -> None:
    """There is what the new row is made from, and nothing besides.

    Args:
        own: whether the router is the merge's.
    """
    expert = request.expert
    named = f"router {router} of {request.merge}" if own else f"router {router}"
    texts = [*([expert.text] if expert.text else []), *request.texts.values()]
    if router not in (*RANDOM, *PROMPTED, *TEXTUAL):
        raise UpcycleError(
            f"{named} makes no row for one expert more: give `router=text`, and `text=FILE` with it"
        )
    if router in RANDOM and (texts or expert.prompts):
        raise UpcycleError(
            f"{named} makes its rows of no text: leave it out, or give "
            "`router=text`, by which the new row is fitted"
        )
    if router in PROMPTED and (texts or not expert.prompts):
        raise UpcycleError(
            f"{named} makes its rows from prompts: give the new "
            "expert's, each by `prompts`, or `router=text` with `text`"
        )
    if router in TEXTUAL and not (expert.text or expert.prompts):
        raise UpcycleError(f"{named} is made from text: give the new expert's, `text=FILE`")
    if router == "domain" and request.texts:
        name = next(iter(request.texts))
        raise UpcycleError(
            f"`text={name}={request.texts[name]}` has no effect: router domain knows the other "
            "experts' texts"
        )


def texts_of_others(request: Addition, record: Made) -> list[str | None]:
    """The text of each expert that there is, if it is known where that lies.

    Raises:
        UpcycleError: a name is of none of them, or of several.
    """
    experts = merge_part(record).experts
    found = [e.text if e.text and e.text.startswith("hf:") else None for e in experts]
    for name, text in request.texts.items():
        places = [i for i, e in enumerate(experts) if name in (str(i), e.model)]
        if len(places) != 1:
            known = ", ".join(f"{i} ({e.model})" for i, e in enumerate(experts))
            many = "several experts" if places else "no expert"
            raise UpcycleError(f"`text={name}={text}`: {name} names {many} of {known}")
        found[places[0]] = text
    return found
