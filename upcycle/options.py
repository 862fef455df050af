"""The options of the commands, each written once, and how a command gets a table of them.

Without torch or transformers: `--help` must be quick.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Options = dict[str, Any]


def setting(text: str, *names: str, panel: str = "Recipe settings") -> Any:
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
Method = Annotated[str | None, setting("split | prune | copy | drop | noise", "--method")]
Experts = Annotated[
    int | None,
    setting(
        "Experts that the router chooses from: parts of each FFN, or copies of it, pruned or "
        "whole. [default: about 24 to 64, or 8 copies]",
        "--experts",
    ),
]
TopK = Annotated[
    int | None,
    setting(
        "Of these, active per token; of pruned copies 1. [default: by --active, or 2 copies]",
        "--top-k",
    ),
]
Active = Annotated[
    float | None,
    setting(
        "Share of all FFN neurons that a token uses, from which a split's top-k and shared "
        "neurons follow, or what a pruned copy keeps; layers kept dense count as 1. [default: 0.5]",
        "--active",
    ),
]
Shared = Annotated[
    float | None,
    setting(
        "Share of each FFN's neurons that is always on, beside a split's experts. [default: 0.25 "
        "with --top-k, else up to that, where the target has a shared expert]",
        "--shared",
    ),
]
SharedExperts = Annotated[
    int | None,
    typer.Option("--shared-experts", hidden=True, envvar="UPCYCLE_SHARED_EXPERTS"),
]
"""No setting any more: who gives it is told the new spelling."""
Granularity = Annotated[
    int | None, setting("Shards that each copy is cut into. [default: 1]", "--granularity")
]
SpreadGain = Annotated[
    bool | None,
    setting(
        "Spread copies' gain over three matrices, as arXiv:2410.07524 does; no longer exact.",
        "--spread-gain/--no-spread-gain",
    ),
]
Split = Annotated[
    str | None,
    setting(
        "predictability | coactivation | coactivation_graph | spectral | parameter_clustering | "
        "token_clusters | sharing_inner | ranked | random | contiguous",
        "--split",
    ),
]
SharedBy = Annotated[
    str | None,
    setting("Rule for the shared neurons: energy | rate | consensus", "--shared-by"),
]
Router = Annotated[
    str | None,
    setting(
        "ridge | centroid | representative | kmeans | membership | static | normal [default: ridge "
        "for a split, membership for pruned copies, normal for copies]",
        "--router",
    ),
]
Compensate = Annotated[
    str | None,
    setting("What makes up for inactive neurons: least_squares | descent | none", "--compensate"),
]
Sequential = Annotated[
    bool | None,
    setting(
        "Fit each layer on what the converted layers before it put out.",
        "--sequential/--no-sequential",
    ),
]
RouterSpread = Annotated[
    float | None,
    setting(
        "Standard deviation of a token's router logits over experts: the smaller, the more alike "
        "their weights; the larger, the less training upsets it. [default: 0.1 with a refit, else "
        "0.01]",
        "--router-spread",
    ),
]
KeepDense = Annotated[
    str | None,
    setting(
        "Layers that stay dense: 0,1,29, none, or auto: those that measurably hurt most, as many "
        "as pay.",
        "--keep-dense",
    ),
]
Target = Annotated[
    str | None,
    setting(
        "auto | mixtral | qwen2_moe | qwen3_moe | glm4_moe | granitemoeshared | flex_olmo",
        "--target",
    ),
]
Calibration = Annotated[
    str | None,
    setting(
        "mixed (builtin and self) | builtin | self | a file or folder of text | "
        "hf:DATASET[@config][:split[:column]] | none; several, joined by +, in equal parts. "
        "[default: mixed]",
        "--calibration",
    ),
]
CalibrationTokens = Annotated[
    int | None, setting("Tokens to fit on. [default: 32768]", "--calibration-tokens")
]
SeqLen = Annotated[int | None, setting("Tokens per sequence. [default: 512]", "--seq-len")]
Dtype = Annotated[str | None, setting("auto | float32 | bfloat16 | float16", "--dtype", panel=RUN)]
Device = Annotated[str | None, setting("auto | cpu | cuda", "--device", panel=RUN)]
MaxShardSize = Annotated[
    str | None, setting("Largest weight file. [default: 5GB]", "--max-shard-size", panel=RUN)
]
Seed = Annotated[int | None, setting("Same seed, same bytes. [default: 0]", "--seed", panel=RUN)]
Check = Annotated[
    str | None,
    setting("How much text to compare the result on: fast | full | none", "--check", panel=RUN),
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
        "--set",
        metavar="KEY=VALUE",
        help="Any setting that `recipes NAME` shows. Repeatable.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a former result at OUT.")]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on after the last finished layer; keep finished layers if stopped."
    ),
]
PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub", metavar="REPO", help="Upload the finished result to this repository."
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make that repository a private one.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]

# The options of every command that plans a conversion, written once: see with_options.
REQUEST: Options = {
    "model": (Model, inspect.Parameter.empty),
    "out": (Out, None),
    "recipe": (RecipeName, "default"),
    "method": (Method, None),
    "experts": (Experts, None),
    "top_k": (TopK, None),
    "active": (Active, None),
    "shared": (Shared, None),
    "shared_experts": (SharedExperts, None),
    "granularity": (Granularity, None),
    "spread_gain": (SpreadGain, None),
    "split": (Split, None),
    "shared_by": (SharedBy, None),
    "router": (Router, None),
    "compensate": (Compensate, None),
    "sequential": (Sequential, None),
    "router_spread": (RouterSpread, None),
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


def _preset_options(panel: str, *rows: tuple[str, type, str]) -> Options:
    """Options that replace fields of a training preset: the field, its type, the help."""
    found: Options = {}
    for field, kind, text in rows:
        option = setting(text, "--" + field.replace("_", "-"), panel=panel)
        found[field] = (Annotated[kind | None, option], None)
    return found


# The options of `finetune` beside its own; what is not here is set by --set.
TRAINING = (
    _preset_options(
        "What trains",
        ("train", str, "router | experts | moe | all"),
        ("lora", int, "Train low-rank changes of this rank."),
        ("merge", bool, "Add them to the weights at the end: a plain checkpoint."),
        ("lr", float, "Highest learning rate."),
        ("router_lr", float, "Of the routers; scaled to a tempered router. [default: --lr]"),
        ("router_warmup", float, "Share of the steps in which only the routers move."),
        ("dense_router_gradient", bool, "Let routers learn from experts not selected, too."),
    )
    | _preset_options(
        "Data and length",
        (
            "data",
            str,
            "A file or folder of text or chats, builtin or "
            "hf:DATASET[@config][:split[:column]]; several, joined by +, in equal parts.",
        ),
        ("assistant_only_loss", bool, "Learn the assistant's turns of chats alone."),
        ("tokens", int, "To train on, from all over a file; its end validates."),
        ("steps", int, "Instead of --tokens."),
        ("seq_len", int, "Tokens per sequence. [default: 512]"),
        ("batch_size", int, "Sequences per step, over all processes. [default: 8]"),
        ("micro_batch", int, "Sequences that a process holds at a time. [default: 1]"),
        ("validate_every", int, "Steps between validations. [default: a tenth of them]"),
    )
    | _preset_options(
        "Losses",
        ("teacher", str, "The dense model to learn from. [default: what MODEL was made from]"),
        ("next_token", float, "Weight of the next-token loss."),
        ("distill", float, "Weight of the KL divergence from the teacher."),
        ("match_layers", float, "Weight of the distance from the teacher's hidden states."),
        ("balance", float, "Weight of the load-balancing loss, over all sequences of a step."),
        (
            "balance_bias",
            float,
            "Balance by a selection bias instead (glm4_moe): what a step moves it by, such as "
            "0.001; scaled to a tempered router.",
        ),
        ("z_loss", float, "Weight of the router z-loss."),
    )
    | _preset_options(
        RUN,
        ("precision", str, "Mixed precision: no | bf16 | fp16"),
        ("gradient_checkpointing", bool, "Less memory, more work."),
        ("device", str, "auto | cpu | cuda"),
        ("seed", int, "Same seed, same bytes on a CPU. [default: 0]"),
        ("tracker", str, "Log to tensorboard, wandb, … as well, by accelerate."),
    )
)
