"""upcycle: turn a dense Hugging Face checkpoint into a Mixture-of-Experts checkpoint.

import upcycle

print(upcycle.plan("meta-llama/Llama-3.2-1B", experts=8, top_k=2).target)
upcycle.convert("meta-llama/Llama-3.2-1B", "out", experts=8, top_k=2)
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The folder of this name is loaded before the function is defined: the first import of a folder
# binds its name here, and would hide the function.
import upcycle.finetune  # noqa: F401
from upcycle.core.errors import AlreadyFinished, CheckFailed, UpcycleError

if TYPE_CHECKING:
    from upcycle.conversion.card import Conversion
    from upcycle.conversion.plan import Plan
    from upcycle.core.progress import Progress
    from upcycle.finetune.finished import Finetuning
    from upcycle.finetune.preparing import Watch

__version__ = version("upcycle")
__all__ = ["AlreadyFinished", "CheckFailed", "UpcycleError", "convert", "finetune", "merge", "plan"]

# A folder has the name of the function `finetune`: imported first, it does not take its place.
import_module("upcycle.finetune")


def plan(
    model: str,
    out: str | Path | None = None,
    *,
    recipe: str | Path = "default",
    revision: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **settings: Any,
) -> "Plan":
    """What `convert` would build; reads no weights and writes nothing.

    Args:
        model: a folder, a hub id or a .gguf file.
        out: where the result would go; the room there is checked.
        recipe: a shipped recipe or a YAML file.
        revision: of a hub id.
        overwrite, resume: as in `convert`.
        settings: fields of the recipe to replace, such as `experts=8`.

    Raises:
        UpcycleError: the request can't be carried out; the sentence says why and what to change.
    """
    from upcycle.conversion.planning import make_plan
    from upcycle.conversion.recipe import load_recipe
    from upcycle.models.opening import open_source

    loaded = load_recipe(recipe, settings)
    source = open_source(model, revision=revision)
    place = None if out is None else Path(out)
    return make_plan(source, loaded, place, overwrite=overwrite, resume=resume)


def convert(
    model: str,
    out: str | Path,
    *,
    recipe: str | Path = "default",
    revision: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: "Progress | None" = None,
    **settings: Any,
) -> "Conversion":
    """Convert a dense checkpoint and check the result. Takes what `plan` takes, and:

    Args:
        overwrite: replace a former output at `out`.
        resume: go on from the last finished layer; see `upcycle.conversion.run.run`.
        progress: called with (stage, done, total).

    Raises:
        AlreadyFinished: the run to resume has left its result.
        UpcycleError: as `plan` does, or the weights or the text are bad; nothing is written.
        CheckFailed: the result broke an invariant; nothing is published.
    """
    from upcycle.conversion.run import run

    made = plan(
        model,
        out,
        recipe=recipe,
        revision=revision,
        overwrite=overwrite,
        resume=resume,
        **settings,
    )
    quiet: Progress = lambda stage, done, total: None  # noqa: E731
    return run(made, overwrite=overwrite, resume=resume, progress=progress or quiet)


def merge(
    models: str | Path | Sequence[str],
    out: str | Path,
    *,
    base: str | None = None,
    shared_model: str | None = None,
    text: str | Mapping[str, str] | None = None,
    add: str | None = None,
    prompts: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    progress: "Progress | None" = None,
    **settings: Any,
) -> "Conversion":
    """Make several fine-tunes of one base the experts of an MoE, and check the result; or, with
    `add`, one more the last expert of a finished one.

    Args:
        models: a mergekit-moe file, or the experts' models, each a folder, a hub id or a .gguf
            file, spelt `model[@revision][+adapter[@revision]]`.
        base: gives all that is no FFN; by default the first of the models.
        shared_model: whose FFN is always on, beside the experts.
        text: texts to fit the router on, by the names of experts' models; with `add`, the new
            expert's alone.
        add: a model that becomes an expert more of the merge that `models` names.
        prompts: of the expert that is added.
        overwrite, resume, progress: as in `convert`.
        settings: fields of the recipe, such as `rest="ties"`, `router="random"` or `top_k=1`.

    Raises:
        AlreadyFinished, UpcycleError, CheckFailed: as `convert` does.
    """
    from upcycle.conversion.merging.planning import plan_merge
    from upcycle.conversion.merging.preflight import merge_request
    from upcycle.conversion.run import run

    names = [models] if isinstance(models, str | Path) else models
    request = merge_request(
        names,
        settings,
        base=base,
        shared_model=shared_model,
        texts={"": text} if isinstance(text, str) else text,
        add=add,
        prompts=prompts,
    )
    made = plan_merge(request, settings, Path(out), overwrite=overwrite, resume=resume)
    quiet: Progress = lambda stage, done, total: None  # noqa: E731
    return run(made, overwrite=overwrite, resume=resume, progress=progress or quiet)


def finetune(
    model: str,
    out: str | Path,
    *,
    preset: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    watch: "Watch | None" = None,
    **settings: Any,
) -> "Finetuning":
    """Train a Mixture-of-Experts further; its arguments are those of `upcycle.finetune.run`."""
    from upcycle.finetune.run import finetune as train

    return train(
        model,
        out,
        preset=preset,
        overwrite=overwrite,
        resume=resume,
        watch=watch,
        **settings,
    )
