"""The options of the commands, each written once, and how a command gets a table of them.

Without torch or transformers: `--help` must be quick.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from upcycle.core.flags import flag_of

Options = dict[str, Any]

FFNS = "What becomes of the FFNs"
SHARE = "How much is on"
TEXT = "Text to fit on"
RUN = "Where and how it runs"
RESULT = "Where the result goes"


def option(text: str, *names: str, panel: str | None = None, metavar: str | None = None) -> Any:
    """An option whose default, if it is worth a word, is in its text."""
    return typer.Option(
        *names, help=text, rich_help_panel=panel, metavar=metavar, show_default=False
    )


Model = Annotated[str, typer.Argument(help="A folder, a hub id or a .gguf file.", metavar="MODEL")]
Out = Annotated[
    Path | None, option("Folder that is to hold the result.", "-o", "--out", panel=RESULT)
]
RecipeName = Annotated[str, option("A shipped recipe or a YAML file.", "--recipe")]
Revision = Annotated[str | None, option("Branch, tag or commit of a hub id.", "--revision")]
Set = Annotated[
    list[str] | None,
    option("Any setting of `upcycle recipes`. Repeatable.", "--set", metavar="KEY=VALUE"),
]
Overwrite = Annotated[bool, option("Replace a former result.", "--overwrite", panel=RESULT)]
Resume = Annotated[
    bool,
    option("Keep finished layers if stopped; go on from them.", "--resume", panel=RUN),
]
DryRun = Annotated[bool, option("The same as `plan`.", "--dry-run", panel=RUN)]
Rehearse = Annotated[
    bool,
    option("Only say what it takes and may bring.", "--dry-run", panel=RUN),
]
PushToHub = Annotated[
    str | None,
    option("Upload the result there, too.", "--push-to-hub", metavar="REPO", panel=RESULT),
]
Private = Annotated[bool, option("Make REPO a private one.", "--private", panel=RESULT)]
Partition = Annotated[
    str | None,
    option(
        "Another split of the same model, say by another seed: how alike their experts are "
        "(adjusted Rand index, by layer).",
        "--partition",
        metavar="MODEL",
    ),
]
Json = Annotated[bool, option("One JSON object on stdout, nothing else.", "--json", panel=RESULT)]

Against = Annotated[str | None, typer.Option(help="The dense model that MODEL was made from.")]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        help="A file or folder of text, probes, builtin or hf:… Repeatable. [default: probes]",
        show_default=False,
    ),
]
TopKs = Annotated[
    str | None,
    typer.Option(
        metavar="K,…", help="Measure MODEL at other numbers of experts per token, too: 4,8,16."
    ),
]
Speed = Annotated[
    bool, typer.Option("--speed", help="Time both models in turn; this holds both in memory.")
]
Card = Annotated[
    bool,
    typer.Option(
        "--card", help="Write the speed to MODEL's README.md, in place of an earlier one."
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="TASK,…", help="Run tasks of lm-eval, such as arc_easy,hellaswag, on both models."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences at once, for --speed and --tasks.")]
EvalDtype = Annotated[
    str,
    typer.Option(
        help="auto | float32 | bfloat16 | float16; auto is float32 on a CPU, elsewhere the "
        "checkpoint's own."
    ),
]


def _settings(panel: str, *rows: tuple[str, Any, str]) -> Options:
    """Options that replace fields of a recipe or a preset: the field, its type, the help."""
    found: Options = {}
    for field, kind, text in rows:
        metavar = "<str>" if kind == list[str] else None
        flag = option(text, flag_of(field), panel=panel, metavar=metavar)
        found[field] = (Annotated[kind | None, flag], None)
    return found


CONVERSION = (
    _settings(
        FFNS,
        ("method", str, "split | prune | copy | drop | noise"),
        ("keep_dense", str, "Layers that stay dense: 0,1,29, none or auto."),
        ("target", str, "auto, or a class in reach: `upcycle inspect MODEL`."),
        ("runtimes", list[str], "To run in llama.cpp, vllm, mlx, … Repeatable."),
    )
    | _settings(
        SHARE,
        ("active", float, "Share of FFN neurons a token uses. [default: 0.5]"),
        ("experts", int, "To choose from. [default: 24 to 64, or 8 copies]"),
        ("top_k", int, "On per token. [default: by --active, or 2 copies]"),
        ("shared", float, "Share of each FFN that is always on (of a split)."),
    )
    | _settings(
        TEXT,
        (
            "calibration",
            str,
            "mixed (builtin and self), builtin, self, a file or folder, hf:DATASET, none; "
            "several joined by +. [default: mixed]",
        ),
        ("calibration_tokens", int, "Tokens to fit on. [default: 32768]"),
        ("seq_len", int, "Tokens per sequence. [default: 512]"),
    )
    | _settings(
        RUN,
        ("check", str, "Text to compare the result on: fast | full | none"),
        ("dtype", str, "auto | float32 | bfloat16 | float16"),
        ("device", str, "auto | cpu | cuda"),
        ("seed", int, "Same seed, same bytes. [default: 0]"),
    )
)
"""The flags for fields of a recipe."""
REQUEST: Options = {
    "model": (Model, inspect.Parameter.empty),
    "recipe": (RecipeName, "default"),
    "set_": (Set, None),
    "revision": (Revision, None),
    **CONVERSION,
    "resume": (Resume, False),
    "out": (Out, None),
    "overwrite": (Overwrite, False),
    "json_": (Json, False),
}
"""The options of every command that plans a conversion: see with_options."""
MERGE: Options = {
    "models": (
        Annotated[
            list[str],
            typer.Argument(
                help="A mergekit-moe file, or the experts' models: MODEL[@REVISION][+ADAPTER].",
                metavar="FILE.yml | MODEL…",
            ),
        ],
        inspect.Parameter.empty,
    ),
    "base": (
        Annotated[
            str | None,
            option("Gives all that is no FFN. [default: the first MODEL]", "--base", panel=FFNS),
        ],
        None,
    ),
    "shared_model": (
        Annotated[
            str | None,
            option("Whose FFN is always on, beside the experts.", "--shared-model", panel=FFNS),
        ],
        None,
    ),
    "add": (
        Annotated[
            str | None,
            option(
                "Becomes an expert more of MODEL, a finished merge.",
                "--add",
                metavar="MODEL",
                panel=FFNS,
            ),
        ],
        None,
    ),
    "text": (
        Annotated[
            list[str] | None,
            option(
                "Text that should be an expert's, to fit the router on (of --add's, TEXT alone). "
                "Repeatable.",
                "--text",
                metavar="MODEL=TEXT",
                panel=TEXT,
            ),
        ],
        None,
    ),
    "prompt": (
        Annotated[
            list[str] | None,
            option(
                "Of --add's, where the router is made from prompts.",
                "--prompt",
                metavar="TEXT",
                panel=TEXT,
            ),
        ],
        None,
    ),
    **_settings(
        FFNS,
        ("rest", str, "Of all but the FFNs: base | mean | linear | ties | dare"),
        ("router", str, "hidden, cheap_embed, random, … [default: the file's, or by --text]"),
        ("target", str, "auto, or one of convert's."),
        ("top_k", int, "Experts on per token. [default: 2]"),
    ),
    **{name: CONVERSION[name] for name in ("seq_len", "check", "dtype", "device", "seed")},
    "set_": (Set, None),
    "resume": (Resume, False),
    "out": (Out, None),
    "overwrite": (Overwrite, False),
    "json_": (Json, False),
}
"""The options of `merge`."""
TRAINING = (
    _settings(
        "What trains",
        ("train", str, "router | partition | experts | moe | all"),
        ("lora", int, "Train low-rank changes of this rank."),
        ("merge", bool, "Add them to the weights at the end."),
        ("lr", float, "Highest learning rate. [default: by recipe]"),
    )
    | _settings(
        "Text and length",
        (
            "data",
            str,
            "Text or chats: a file, a folder, hf:DATASET, builtin; joined by +.",
        ),
        ("assistant_only_loss", bool, "Of chats, learn the assistant's turns."),
        ("tokens", int, "To train on; 5 % more are held out."),
        ("steps", int, "Instead of --tokens."),
        ("seq_len", int, "Tokens per sequence. [default: 512]"),
        ("batch_size", int, "Sequences a step. [default: by recipe]"),
    )
    | _settings(
        "Losses",
        ("teacher", str, "The dense model. [default: MODEL's source]"),
        ("distill", float, "Weight of the KL divergence from the teacher."),
        ("balance", float, "Weight of the load-balancing loss."),
    )
    | _settings(
        RUN,
        ("precision", str, "Mixed precision: no | bf16 | fp16"),
        ("device", str, "auto | cpu | cuda"),
        ("seed", int, "Same seed, same bytes on a CPU. [default: 0]"),
    )
)
"""The flags for fields of a training request."""


def with_options(listed: Options) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes `options`, and perhaps options of its own, all those listed."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = dict(inspect.signature(command).parameters)
        del own["options"]

        @functools.wraps(command)
        def wrapper(**options: Any) -> None:
            command(options, **{name: options.pop(name) for name in own})

        types = {name: annotation for name, (annotation, _) in listed.items()}
        types |= {name: parameter.annotation for name, parameter in own.items()}
        wrapper.__annotations__ = types | {"return": None}
        keyword = inspect.Parameter.KEYWORD_ONLY
        shared = [
            inspect.Parameter(name, keyword, default=default, annotation=annotation)
            for name, (annotation, default) in listed.items()
        ]
        added = [parameter.replace(kind=keyword) for parameter in own.values()]
        wrapper.__signature__ = inspect.Signature([*shared, *added])  # type: ignore[attr-defined]
        return wrapper

    return decorate
