"""The command line: parse, call, render. The only place that ends the process."""

import gc
import io
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upcycle.arguments import OfRecipe, OfTraining, assignment, texts_by_owner
from upcycle.console.ending import ending, first_process, print_json
from upcycle.core.errors import UpcycleError
from upcycle.core.flags import MERGE_FLAGS
from upcycle.core.json_text import json_text
from upcycle.core.paths import check_model, local_path, write_whole
from upcycle.models.hub import check_repo, push
from upcycle.options import (
    CONVERSION,
    MERGE,
    REQUEST,
    RUN,
    TRAINING,
    Against,
    BatchSize,
    Card,
    DryRun,
    EvalDtype,
    Json,
    Model,
    Options,
    Out,
    Overwrite,
    Partition,
    Private,
    PushToHub,
    Rehearse,
    Revision,
    Set,
    Speed,
    Tasks,
    Texts,
    TopKs,
    option,
    with_options,
)

if TYPE_CHECKING:
    from upcycle.conversion.plan import Plan
    from upcycle.finetune.finished import Finetuning

app = typer.Typer(
    name="upcycle",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    # --top_k is --top-k
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
    help="Turn a dense Hugging Face checkpoint into a native Mixture-of-Experts checkpoint.",
    epilog="Start with `upcycle inspect MODEL`, then `upcycle plan MODEL --experts 8 --top-k 2`.",
)


def _show_version(asked: bool) -> None:
    if asked:
        from upcycle import __version__

        sys.stdout.write(f"{__version__}\n")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass


@app.command(cls=OfRecipe)
@with_options(REQUEST)
def convert(
    options: Options,
    dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
) -> None:
    """Convert a dense checkpoint into a Mixture-of-Experts, and check the result.

    **split** cuts each FFN into experts: same size, less work per token, some loss. **prune** makes
    every expert a pruned copy of the FFN: larger, less work, less loss. **copy** makes every expert
    the whole FFN, **drop** and **noise** perturb it: larger, to be trained.

    Examples:

    * `upcycle convert meta-llama/Llama-3.2-1B --experts 8 --top-k 2 -o out`
    * `upcycle convert ./my-llama --method prune --active 0.25 -o out`
    * `upcycle convert ./my-llama --recipe cmoe --set router=ridge -o out`
    """
    if dry_run:
        return _show_plan(options)
    with ending(as_json=options["json_"]):
        if options["out"] is None:
            raise UpcycleError("name the folder for the result: -o OUT")
        check_repo(push_to_hub, private=private)
        _check_conversion(options)
        with _importing():
            from upcycle.conversion import run  # noqa: F401

        _quiet_model_loading()
        _carry_out(_plan(options), options, push_to_hub, private=private)
    return None


def _carry_out(made: "Plan", options: Options, push_to_hub: str | None, *, private: bool) -> None:
    """Build what was planned, show what came of it, and perhaps publish it."""
    from upcycle.console.conversion import show_conversion
    from upcycle.console.output import show_push
    from upcycle.console.plan import show_warnings
    from upcycle.console.progress import progress_bars
    from upcycle.conversion.card import conversion_summary
    from upcycle.conversion.run import run

    as_json = options["json_"]
    if not as_json:
        show_warnings(made)
    with progress_bars(quiet=as_json) as progress:
        overwrite, resume = options["overwrite"], options["resume"]
        done = run(made, overwrite=overwrite, resume=resume, progress=progress)
    if as_json:
        print_json(conversion_summary(done).plain())
    else:
        show_conversion(done)
    if push_to_hub is not None:
        show_push(push(done.out, push_to_hub, private=private), quiet=as_json)


@app.command(cls=OfRecipe)
@with_options(REQUEST)
def plan(options: Options) -> None:
    """Show what `convert` would build, and raise every error that can be known. Writes nothing."""
    _show_plan(options)


def _show_plan(options: Options) -> None:
    with ending():
        _check_conversion(options)
        with _importing():
            from upcycle.conversion import card  # noqa: F401

        _quiet_model_loading()
        _print_plan(_plan(options), as_json=options["json_"])


def _print_plan(made: "Plan", *, as_json: bool) -> None:
    from upcycle.console.plan import show_plan
    from upcycle.conversion.card import plan_summary

    if as_json:
        print_json(plan_summary(made).plain())
    else:
        show_plan(made)


@app.command(cls=OfRecipe)
@with_options(MERGE)
def merge(
    options: Options,
    dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
) -> None:
    """Make several fine-tunes of one base the experts of a Mixture-of-Experts.

    A file of mergekit-moe is taken as it is. Without one, the experts' models are named here.
    --add gives a finished merge one expert more.

    Examples:

    * `upcycle merge config.yml -o out`
    * `upcycle merge ./coder ./writer --base ./base --rest ties -o out`
    * `upcycle merge ./base+lora1 ./base+lora2 --base ./base -o out`
    * `upcycle merge ./merged --add ./lawyer --text law.txt -o out`
    """
    with ending(as_json=options["json_"]):
        if options["out"] is None and not dry_run:
            raise UpcycleError("name the folder for the result: -o OUT")
        check_repo(push_to_hub, private=private)
        from upcycle.conversion.merging.preflight import merge_request

        given = _recipe_settings(options, MERGE_FLAGS)
        request = merge_request(
            options["models"],
            given,
            base=options["base"],
            shared_model=options["shared_model"],
            texts=texts_by_owner(options["text"] or [], added=options["add"] is not None),
            add=options["add"],
            prompts=options["prompt"] or [],
        )
        with _importing():
            from upcycle.conversion.merging.planning import plan_merge

        _quiet_model_loading()
        overwrite, resume = options["overwrite"], options["resume"]
        made = plan_merge(request, given, options["out"], overwrite=overwrite, resume=resume)
        if dry_run:
            _print_plan(made, as_json=options["json_"])
        else:
            _carry_out(made, options, push_to_hub, private=private)


def _check_conversion(options: Options) -> None:
    """Raise what is wrong with the request, as far as it shows without torch."""
    from upcycle.conversion.preflight import check_conversion

    check_conversion(
        options["model"], options["recipe"], options["revision"], _recipe_settings(options)
    )


def _recipe_settings(options: Options, flags: Collection[str] = CONVERSION) -> dict[str, Any]:
    """The fields of the recipe that the command's options replace."""
    settings = {name: options[name] for name in flags if options[name] not in (None, [])}
    return settings | dict(assignment(text) for text in options["set_"] or [])


def _plan(options: Options) -> "Plan":
    """The plan that the command's options ask for."""
    from upcycle import plan as make

    return make(
        options["model"],
        options["out"],
        recipe=options["recipe"],
        revision=options["revision"],
        overwrite=options["overwrite"],
        resume=options["resume"],
        **_recipe_settings(options),
    )


@app.command(cls=OfTraining)
@with_options(TRAINING)
def finetune(
    options: Options,
    model: Annotated[
        str, typer.Argument(help="An MoE (relufy: dense), a folder or hub id.", metavar="MODEL")
    ],
    recipe: Annotated[
        str | None,
        option(
            "heal | specialise | routers | btx | lora | …, or a YAML file. [default: by MODEL]",
            "--recipe",
        ),
    ] = None,
    set_: Set = None,
    resume: Annotated[
        bool, option("Go on from the state of a run that was stopped.", "--resume", panel=RUN)
    ] = False,
    dry_run: Rehearse = False,
    out: Out = None,
    overwrite: Overwrite = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    json_: Json = False,
) -> None:
    """Train a Mixture-of-Experts further: heal a split, or let copies come to differ.

    Runs alone or, by `torchrun --nproc_per_node 2 -m upcycle finetune …`, as several processes.
    Ctrl-C saves the state, from which --resume goes on. The result is a checkpoint like MODEL.

    Examples:

    * `upcycle finetune split --data notes.txt -o healed`
    * `upcycle finetune copies --recipe specialise --data hf:DATASET -o out`
    * `upcycle finetune merged --recipe routers --data code.txt+law.txt -o out`
    * `upcycle finetune split --recipe lora --merge --data chats.jsonl -o out`
    """
    kept = "" if dry_run else "; --resume goes on from the last saved state"
    with ending(f"interrupted{kept}", as_json=json_):
        from upcycle.finetune.preflight import check_finetuning

        settings = {name: value for name, value in options.items() if value is not None}
        settings |= dict(assignment(text) for text in set_ or [])
        if out is None and not dry_run:
            raise UpcycleError("name the folder for the result: -o OUT")
        check_repo(push_to_hub, private=private)
        check_finetuning(model, recipe, settings)
        if out is None or dry_run:
            _rehearse(model, recipe, settings, as_json=json_)
            return
        from upcycle.console.training import watching_training
        from upcycle.finetune.run import finetune as train

        _quiet_model_loading()
        with watching_training(quiet=json_ or not first_process()) as watch:
            done = train(
                model,
                out,
                preset=recipe,
                overwrite=overwrite,
                resume=resume,
                watch=watch,
                **settings,
            )
        if first_process():
            _tell_training(done, push_to_hub, private=private, as_json=json_)


def _tell_training(
    done: "Finetuning", push_to: str | None, *, private: bool, as_json: bool
) -> None:
    """Show what a run of `finetune` did, and push it if that was asked for."""
    from upcycle.console.output import show_push
    from upcycle.console.training import show_finetuning
    from upcycle.finetune.finished import finetuning_summary

    if as_json:
        print_json(finetuning_summary(done).plain())
    else:
        show_finetuning(done)
    if push_to is not None:
        show_push(push(done.out, push_to, private=private), quiet=as_json)


def _rehearse(model: str, recipe: str | None, settings: Options, *, as_json: bool) -> None:
    """Show what a run of `finetune` would take here, and may bring."""
    from upcycle.console.training import show_proposal, watching_training
    from upcycle.finetune.run import rehearse

    _quiet_model_loading()
    with watching_training(quiet=as_json or not first_process()) as watch:
        made = rehearse(model, preset=recipe, watch=watch, **settings)
    if not first_process():
        return
    if as_json:
        print_json(made.plain())
    else:
        show_proposal(made)


@app.command("eval")
def evaluate(
    model: Model,
    against: Against = None,
    text: Texts = None,
    tokens: Annotated[int, typer.Option(min=8, help="Of each text, from all over it.")] = 8192,
    seq_len: Annotated[int, typer.Option(min=8, help="Tokens per window.")] = 512,
    top_k: TopKs = None,
    speed: Speed = False,
    card: Card = False,
    tasks: Tasks = None,
    batch_size: BatchSize = 1,
    dtype: EvalDtype = "auto",
    device: Annotated[str, typer.Option(help="auto | cpu | cuda")] = "auto",
    output: Annotated[Path | None, typer.Option(help="File for the JSON object, too.")] = None,
    json_: Json = False,
) -> None:
    """Measure how good a model is on texts, how far it is from the dense model, how tokens spread
    over experts, what it costs, and perhaps how fast it is. Of an encoder, how far its hidden
    states are from those of the dense model.

    Windows of the same length are taken evenly from all over a text, each read on its own; its
    first token is given.

    Examples:

    * `upcycle eval out --against MODEL --text notes.txt --text code.txt`
    * `upcycle eval out --against MODEL --speed --card --output eval.json`
    * `upcycle eval out --against MODEL --top-k 4,8,16`
    """
    with ending():
        from upcycle.evaluation.preflight import check_evaluation, top_ks_named

        _check_file(output)
        check_evaluation(model, against, text or [])
        top_ks = None if top_k is None else top_ks_named(top_k)
        from upcycle.console.progress import progress_bars
        from upcycle.evaluation import encoders
        from upcycle.evaluation.speed_card import check_card

        if card:
            check_card(model, speed=speed)
        _quiet_model_loading()
        with progress_bars(quiet=json_) as progress:
            report = encoders.evaluate_any(
                model,
                text or ["probes"],
                against=against,
                tokens=tokens,
                seq_len=seq_len,
                top_ks=top_ks,
                speed=speed,
                tasks=None if tasks is None else [name.strip() for name in tasks.split(",")],
                batch_size=batch_size,
                dtype=dtype,
                device=device,
                progress=progress,
            )
        _tell(report, output, card=card, as_json=json_)


def _tell(report: Any, output: Path | None, *, card: bool, as_json: bool) -> None:
    """Write and show what was measured, of an encoder or of another model."""
    from upcycle.console.evaluation import show_evaluation, show_hidden
    from upcycle.evaluation import encoders
    from upcycle.evaluation.speed_card import write_speed

    summary = encoders.summary_of(report)
    if output is not None:
        _write_json(output, summary)
    if card:
        write_speed(report)
    if as_json:
        print_json(summary)
    elif isinstance(report, encoders.HiddenEvaluation):
        show_hidden(report)
    else:
        show_evaluation(report)


@app.command()
def inspect(
    model: Model, revision: Revision = None, partition: Partition = None, json_: Json = False
) -> None:
    """Show a model's shapes, its FFN width and divisors, and the MoE targets that it can reach."""
    with ending():
        check_model(model, revision)
        from upcycle.console.listing import show_inspection
        from upcycle.conversion.inspection import inspect_model
        from upcycle.evaluation.stability import partition_agreement

        _quiet_model_loading()
        report = inspect_model(model, revision=revision)
        if partition is not None:
            report["agreement"] = partition_agreement(model, partition)
        if json_:
            print_json(report)
        else:
            show_inspection(report)


@app.command()
def report(
    model: Model,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The HTML file to write.")] = None,
    against: Against = None,
    text: Texts = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=8, help="Of each text, from all over it. [default: 4096]", show_default=False
        ),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(min=8, help="Tokens per window. [default: 512]", show_default=False),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="What `upcycle eval --json` printed, instead of evaluating now."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Show a model on one HTML page: its quality beside the dense model's, how its experts are
    used, how it was made and trained. The page needs nothing but itself.

    Examples:

    * `upcycle report out --against MODEL -o report.html`
    * `upcycle report out --evaluation eval.json -o report.html`
    """
    with ending():
        from upcycle.evaluation.preflight import check_evaluation

        if out is None:
            raise UpcycleError("name the file for the page: -o report.html")
        if evaluation is not None and (against or text or tokens or seq_len):
            raise UpcycleError(
                "--evaluation holds numbers already: drop --against, --text, --tokens and --seq-len"
            )
        check_evaluation(model, against, text or [])
        from upcycle.console.progress import progress_bars
        from upcycle.evaluation.page import facts, render

        out = local_path(out)
        facts.check_page(out, overwrite=overwrite)
        _quiet_model_loading()
        found = facts.gather(model)
        if evaluation is not None:
            measured = facts.read_evaluation(local_path(evaluation), found)
        else:
            with progress_bars(quiet=False) as progress:
                measured = facts.evaluate_model(
                    model, text or ["probes"], against, tokens or 4096, seq_len or 512, progress
                )
        write_whole(out, render(found, measured))
        sys.stdout.write(f"{out}\n")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one as YAML.")] = None,
    json_: Json = False,
) -> None:
    """List the recipes of `convert` and `finetune`, the methods that they are made of and every
    setting, or print one recipe."""
    with ending():
        from upcycle.console.listing import every_method, every_setting, show_recipes, show_settings
        from upcycle.conversion.catalogue import describe_presets, describe_recipes
        from upcycle.conversion.recipe import load_recipe
        from upcycle.core.settings import recipe_text, shipped_presets, yaml_fields

        if name is not None and json_:
            presets = shipped_presets()
            preset = yaml_fields(presets[name]) if name in presets else None
            print_json(preset or load_recipe(name).settings())
        elif name is not None:
            sys.stdout.write(recipe_text(name))
        elif json_:
            listed = {"recipes": describe_recipes(), "presets": describe_presets()}
            print_json(listed | {"methods": every_method(), "settings": every_setting()})
        else:
            show_recipes(describe_recipes(), describe_presets(), every_method())
            show_settings(every_setting())


@app.command()
def env(json_: Json = False) -> None:
    """Show versions and the machine, for a bug report."""
    with ending():
        from upcycle.console.output import table
        from upcycle.conversion.inspection import describe_environment

        if json_:
            print_json(describe_environment())
        else:
            table("environment", describe_environment())


def _check_file(output: Path | None) -> None:
    """Raise before the work what would keep its result from being written."""
    if output is None:
        return
    path = local_path(output)
    if path.is_dir():
        raise UpcycleError(f"--output {output} is a folder: give a file")
    if not path.parent.is_dir():
        raise UpcycleError(f"--output {output}: {output.parent} is no folder: make it first")
    needed = [path] if path.exists() else []
    if path.is_file() or not path.exists():
        needed.append(path.resolve().parent)  # in which the new file takes the former one's place
    if not all(os.access(place, os.W_OK) for place in needed):
        raise UpcycleError(f"--output {output} can't be written: give another file")


def _write_json(output: Path, value: Any) -> None:
    """A file of JSON; a link to one stays, and the file that it leads to is replaced."""
    path = local_path(output)
    write_whole(path.resolve() if path.is_file() else path, json_text(value, indent=2) + "\n")


@contextmanager
def _importing() -> Iterator[None]:
    """Without the garbage collector, which looks again and again through what torch and
    transformers make, and never finds any: a fifth of the seconds that they take."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _quiet_model_loading() -> None:
    """transformers' own bars, load reports and deprecations would break up ours."""
    import warnings

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # its retries, when offline
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def main() -> None:
    """Entry point of `upcycle`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # arrows and lines, where it is not UTF-8
    app()
