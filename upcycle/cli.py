"""The command line: parse, call, render. The only place that ends the process."""

import functools
import inspect as inspect_
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from upcycle.errors import CheckFailed, UpcycleError

if TYPE_CHECKING:
    from upcycle.planning import Plan

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


def _setting(text: str, *names: str, panel: str = "Recipe settings") -> Any:
    """An option that replaces a field of the recipe; also read from UPCYCLE_<NAME>."""
    variable = "UPCYCLE_" + names[0].split("/")[0].lstrip("-").replace("-", "_").upper()
    return typer.Option(
        *names, help=text, envvar=variable, rich_help_panel=panel, show_default=False
    )


RUN = "How to run"
Model = Annotated[str, typer.Argument(help="A folder, a hub id or a .gguf file.", metavar="MODEL")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Folder that is to hold the result.")]
RecipeName = Annotated[
    str, typer.Option("--recipe", envvar="UPCYCLE_RECIPE", help="A shipped recipe or a YAML file.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Method = Annotated[str | None, _setting("split | copy | drop | noise", "--method")]
Experts = Annotated[
    int | None,
    _setting(
        "Parts that a split cuts each FFN into, or copies of it. [default: 32 to 64, or 8 copies]",
        "--experts",
    ),
]
TopK = Annotated[
    int | None,
    _setting("Routed experts active per token. [default: by --active, or 2 copies]", "--top-k"),
]
Active = Annotated[
    float | None,
    _setting(
        "Share of all FFN neurons that a token uses, from which a split's top-k and shared "
        "experts follow; layers kept dense count as 1. [default: 0.5]",
        "--active",
    ),
]
SharedExperts = Annotated[
    int | None,
    _setting(
        "Of a split's parts, those that are always on. [default: up to a quarter where the target "
        "has a shared expert]",
        "--shared-experts",
    ),
]
Granularity = Annotated[
    int | None, _setting("Shards that each copy is cut into. [default: 1]", "--granularity")
]
Split = Annotated[
    str | None,
    _setting(
        "predictability | coactivation | coactivation_graph | parameter_clustering | "
        "token_clusters | ranked | random | contiguous",
        "--split",
    ),
]
SharedBy = Annotated[
    str | None, _setting("Rule for the shared neurons: energy | rate", "--shared-by")
]
Router = Annotated[
    str | None,
    _setting(
        "ridge | centroid | representative | kmeans | static | normal [default: ridge for a "
        "split, normal for copies]",
        "--router",
    ),
]
Compensate = Annotated[
    str | None,
    _setting("What makes up for inactive neurons: least_squares | none", "--compensate"),
]
Sequential = Annotated[
    bool | None,
    _setting(
        "Fit each layer on what the converted layers before it put out.",
        "--sequential/--no-sequential",
    ),
]
KeepDense = Annotated[
    str | None,
    _setting(
        "Layers that stay dense: 0,1,29, none, or auto: those that measurably hurt most, as many "
        "as pay.",
        "--keep-dense",
    ),
]
Target = Annotated[
    str | None,
    _setting(
        "auto | mixtral | qwen2_moe | qwen3_moe | glm4_moe | granitemoeshared | flex_olmo",
        "--target",
    ),
]
Calibration = Annotated[
    str | None,
    _setting(
        "builtin | self | a .txt, .jsonl or .parquet file | hf:DATASET[:split[:column]] | none; "
        "several, joined by +, in equal parts",
        "--calibration",
    ),
]
CalibrationTokens = Annotated[
    int | None, _setting("Tokens to fit on. [default: 32768]", "--calibration-tokens")
]
SeqLen = Annotated[int | None, _setting("Tokens per sequence. [default: 512]", "--seq-len")]
Dtype = Annotated[str | None, _setting("auto | float32 | bfloat16 | float16", "--dtype", panel=RUN)]
Device = Annotated[str | None, _setting("auto | cpu | cuda", "--device", panel=RUN)]
MaxShardSize = Annotated[
    str | None, _setting("Largest weight file. [default: 5GB]", "--max-shard-size", panel=RUN)
]
Seed = Annotated[int | None, _setting("Same seed, same bytes. [default: 0]", "--seed", panel=RUN)]
Check = Annotated[
    str | None,
    _setting("How much text to compare the result on: fast | full | none", "--check", panel=RUN),
]
FrozenRouter = Annotated[
    bool | None,
    typer.Option(
        "--allow-frozen-router",
        help="Allow one copy per token where its router can't learn.",
        show_default=False,
        rich_help_panel=RUN,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any setting, such as split.rows=up. Repeatable."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a former result at OUT.")]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on after the last finished layer; keep finished layers if stopped."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]

# The options of every command that plans a conversion, written once: see _with_request.
REQUEST = {
    "model": (Model, inspect_.Parameter.empty),
    "out": (Out, None),
    "recipe": (RecipeName, "default"),
    "method": (Method, None),
    "experts": (Experts, None),
    "top_k": (TopK, None),
    "active": (Active, None),
    "shared_experts": (SharedExperts, None),
    "granularity": (Granularity, None),
    "split": (Split, None),
    "shared_by": (SharedBy, None),
    "router": (Router, None),
    "compensate": (Compensate, None),
    "sequential": (Sequential, None),
    "keep_dense": (KeepDense, None),
    "target": (Target, None),
    "calibration": (Calibration, None),
    "calibration_tokens": (CalibrationTokens, None),
    "seq_len": (SeqLen, None),
    "set_": (Set, None),
    "dtype": (Dtype, None),
    "device": (Device, None),
    "max_shard_size": (MaxShardSize, None),
    "seed": (Seed, None),
    "check": (Check, None),
    "allow_frozen_router": (FrozenRouter, None),
    "revision": (Revision, None),
    "overwrite": (Overwrite, False),
    "resume": (Resume, False),
    "json_": (Json, False),
}
NOT_SETTINGS = {"model", "out", "recipe", "set_", "revision", "overwrite", "resume", "json_"}
Options = dict[str, Any]


def _with_request(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `options`, and perhaps options of its own, all those of REQUEST."""
    own = dict(inspect_.signature(command).parameters)
    del own["options"]

    @functools.wraps(command)
    def wrapper(**options: Any) -> None:
        command(options, **{name: options.pop(name) for name in own})

    options = {name: annotation for name, (annotation, _) in REQUEST.items()}
    wrapper.__annotations__ = options | {n: p.annotation for n, p in own.items()} | {"return": None}
    keyword = inspect_.Parameter.KEYWORD_ONLY
    shared = [
        inspect_.Parameter(name, keyword, default=default, annotation=annotation)
        for name, (annotation, default) in REQUEST.items()
    ]
    added = [parameter.replace(kind=keyword) for parameter in own.values()]
    wrapper.__signature__ = inspect_.Signature([*shared, *added])  # type: ignore[attr-defined]
    return wrapper


@app.command()
@_with_request
def convert(
    options: Options,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same as `plan`.")] = False,
) -> None:
    """Convert a dense checkpoint into a Mixture-of-Experts, and check the result.

    A **split** cuts each FFN into experts: same size, less work per token, some loss. **copy**
    makes every expert the whole FFN (sparse upcycling), **drop** re-draws half of each copy
    (drop-upcycling): larger, to be trained further.

    Examples:

    * `upcycle convert meta-llama/Llama-3.2-1B --experts 8 --top-k 2 -o out`
    * `upcycle convert ./my-llama --method copy --experts 8 --top-k 2 -o out`
    * `upcycle convert ./my-llama --recipe moefication -o out`
    """
    if dry_run:
        return _show_plan(options)
    with _errors():
        from upcycle import console
        from upcycle.conversion import run
        from upcycle.report import conversion_summary

        if options["out"] is None:
            raise UpcycleError("name the folder for the result: -o OUT")
        _quiet_model_loading()
        made, as_json = _plan(options), options["json_"]
        if not as_json:
            console.show_warnings(made)
        with console.progress_bars(quiet=as_json) as progress:
            overwrite, resume = options["overwrite"], options["resume"]
            done = run(made, overwrite=overwrite, resume=resume, progress=progress)
        if as_json:
            _print_json(conversion_summary(done))
        else:
            console.show_conversion(done)
    return None


@app.command()
@_with_request
def plan(options: Options) -> None:
    """Show what `convert` would build, and raise every error that can be known. Writes nothing."""
    _show_plan(options)


def _show_plan(options: Options) -> None:
    with _errors():
        from upcycle import console
        from upcycle.report import plan_summary

        _quiet_model_loading()
        made = _plan(options)
        if options["json_"]:
            _print_json(plan_summary(made))
        else:
            console.show_plan(made)


def _plan(options: Options) -> "Plan":
    """The plan that the command's options ask for."""
    from upcycle import plan as make

    settings = {k: v for k, v in options.items() if k not in NOT_SETTINGS and v is not None}
    settings |= dict(_assignment(text) for text in options["set_"] or [])
    return make(
        options["model"],
        options["out"],
        recipe=options["recipe"],
        revision=options["revision"],
        overwrite=options["overwrite"],
        **settings,
    )


def _assignment(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise UpcycleError(f"--set {text!r} is not KEY=VALUE")
    try:
        return key.strip(), yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise UpcycleError(f"--set {text!r}: the value is not YAML") from error


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[str, typer.Option(help="A .txt, .jsonl or .parquet file, builtin or hf:…")],
    against: Annotated[
        str | None, typer.Option(help="The dense model that MODEL was made from.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, help="How many, from the text's start.")] = 16384,
    seq_len: Annotated[int, typer.Option(min=8, help="Tokens per window.")] = 512,
    json_: Json = False,
) -> None:
    """Measure a model's perplexity on a text, and how far it is from the dense model.

    The text is cut into windows of the same length, each read on its own; the first token of a
    window is given. Everything is computed in float32.
    """
    with _errors():
        from dataclasses import asdict

        from upcycle import console
        from upcycle.evaluate import evaluate as measure

        _quiet_model_loading()
        with console.progress_bars(quiet=json_) as progress:
            report = measure(
                model, text, against=against, tokens=tokens, seq_len=seq_len, progress=progress
            )
        if json_:
            _print_json(asdict(report) | {"perplexity_ratio": report.perplexity_ratio})
        else:
            console.show_evaluation(model, report)


@app.command()
def inspect(model: Model, revision: Revision = None, json_: Json = False) -> None:
    """Show a model's shapes, its FFN width and divisors, and the MoE targets that it can reach."""
    with _errors():
        from upcycle import console
        from upcycle.inspection import inspect_model

        report = inspect_model(model, revision=revision)
        if json_:
            _print_json(report)
        else:
            console.show_inspection(report)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one as YAML.")] = None,
    json_: Json = False,
) -> None:
    """List the shipped recipes and the methods that they are made of, or print one recipe."""
    with _errors():
        from upcycle import console
        from upcycle.inspection import describe_methods, describe_recipes
        from upcycle.recipe import load_recipe, recipe_text

        if name is not None and json_:
            _print_json(load_recipe(name).settings())
        elif name is not None:
            sys.stdout.write(recipe_text(name))
        elif json_:
            _print_json({"recipes": describe_recipes(), "methods": describe_methods()})
        else:
            console.show_recipes(describe_recipes(), describe_methods())


@app.command()
def env(json_: Json = False) -> None:
    """Show versions and the machine, for a bug report."""
    with _errors():
        from upcycle import console
        from upcycle.inspection import describe_environment

        if json_:
            _print_json(describe_environment())
        else:
            console.table("environment", describe_environment())


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


@contextmanager
def _errors() -> Iterator[None]:
    """One sentence instead of a traceback: exit code 2 for bad input, 1 for anything else."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except UpcycleError as error:
        _fail(str(error), 2)
    except CheckFailed as error:
        _fail(f"{error}; please report this", 1)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was left behind, unless --resume was given to go on later", 1)
    except OSError as error:
        _fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""), 1)
    except MemoryError:
        _fail("out of memory: lower --calibration-tokens, or pass --check none", 1)


def _fail(sentence: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {sentence}\n")
    raise typer.Exit(code)


def _quiet_model_loading() -> None:
    """transformers' own bars and load reports would break up ours."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # its retries, when offline


def main() -> None:
    """Entry point of `upcycle`."""
    app()
