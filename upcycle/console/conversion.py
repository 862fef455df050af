"""A conversion: what changed, what it cost, and what the check means."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.text import Text

from upcycle.console.evaluation import show_hidden_texts
from upcycle.console.output import COLOURS, out, show_notes, table, told_apart
from upcycle.console.plan import layers, method
from upcycle.core.flags import as_flags
from upcycle.core.paths import public_name
from upcycle.core.words import count, size
from upcycle.evaluation.verdict import verdict
from upcycle.models.record.check import EncoderReport
from upcycle.models.text import kind_name

if TYPE_CHECKING:
    from upcycle.conversion.card import Conversion
    from upcycle.models.record.check import Report
    from upcycle.models.record.merging import Beside, Findings

TEXTS_AT_ONCE = 4
"""Columns of texts that a terminal has room for."""


def show_conversion(conversion: "Conversion") -> None:
    """What changed and what it cost."""
    plan, check = conversion.plan, conversion.check
    rows: dict[str, Any] = {
        "parameters": (count(plan.params_dense), count(plan.params_total)),
        "active per token": (count(plan.params_dense), count(plan.params_active)),
        "active FFN": ("100 %", f"{100 * plan.active_ffn_ratio:.0f} %"),
        "layers": ("", layers(plan)),
    }
    if check is not None:
        loads = [share for layer in check.load for share in layer]
        rows |= {
            "expert load": ("", f"{min(loads):.2f} to {max(loads):.2f} × fair share"),
            "dead experts": ("", f"{check.dead_experts} of {len(loads)}"),
        }
    rows["peak memory"] = ("", size(conversion.peak_bytes))
    out.print(plan.way.usage(plan.design.geometry), highlight=False)
    table(f"{plan.source.label} → {plan.target}", rows, "dense", "MoE")
    took = ", ".join(f"{name} {s:.0f} s" for name, s in conversion.seconds.items())
    out.print(f"Made: {method(plan)}. Took: {took}.", highlight=False)
    if conversion.learned:
        out.print(f"Fit: {conversion.learned}", highlight=False)
    _show_trials(conversion)
    if check is not None:
        out.print(f"Exactness: {_exactness(conversion)}.", highlight=False)
        _show_kinds(check)
        what = "Hidden states" if isinstance(check, EncoderReport) else "Perplexity"
        out.print(
            f"{what} on {check.tokens:,} tokens that nothing was fitted on, windows of "
            f"{check.window}."
            + "".join(f" Left out: {escape(kind_name(kind))}." for kind in check.left_out),
            highlight=False,
        )
        for sentence in _verdict(conversion):
            out.print(sentence, highlight=False)
    else:
        out.print("Not checked (--check none).", highlight=False)
    if conversion.findings is not None:
        _show_findings(conversion.findings, public_name(plan.source.label))
    loader = plan.source.arch.loader
    out.print(
        f"[bold]{escape(str(conversion.out))}[/] loads with {loader}.from_pretrained",
        highlight=False,
    )


def _show_findings(found: "Findings", base: str) -> None:
    """What a merge has shown of its models."""
    if found.distances is not None:
        rows = {
            source.model: (_share_of(source.ffn), _share_of(source.rest))
            for source in found.distances.sources
        }
        table(f"how far from {base}, in its own length", rows, "FFNs", "rest")
    for sentence in found.sentences:
        out.print(escape(as_flags(sentence)), highlight=False)
    if found.perplexities is not None:
        _show_beside(found.perplexities)
    show_notes(found.notes)


def _share_of(value: float) -> str:
    return f"{100 * value:.3g} %"


def _show_beside(beside: "Beside") -> None:
    """The perplexities of a merge and its models, some texts at a time."""
    for start in range(0, len(beside.texts), TEXTS_AT_ONCE):
        some = slice(start, start + TEXTS_AT_ONCE)
        rows = {
            row.model: tuple(f"{value:.2f}" for value in row.perplexity[some])
            for row in beside.models
        }
        title = "perplexity on the experts' texts, which nothing was fitted on"
        table(title, rows, *map(kind_name, beside.texts[some]))


def _exactness(conversion: "Conversion") -> str:
    check = conversion.check
    if check is None or check.exact_error is None:
        return f"not expected: {conversion.plan.way.changed}"
    plan, what = conversion.plan, "all experts on"
    if plan.exact == "logits":
        what = "copies"
    elif not plan.partitions:
        what += ", repeated neurons in both"
    if plan.design.refits:
        what += ", refit weights in both"
    return f"ok, {what}: {plan.source.arch.output} differ by {check.exact_error:.1g} σ"


def _show_trials(conversion: "Conversion") -> None:
    """What the choices of dense layers are worth; and what the one that was made costs."""
    found, plan = conversion.dense_layers, conversion.plan
    if found is None:
        return
    tried = ", ".join(
        f"{trial.mean:.2f} × (worst text {trial.worst:.2f} ×) with {_named(trial.layers)}"
        for trial in found.trials
    )
    out.print(f"Dense layers, tried on a few tokens: perplexity {tried}.", highlight=False)
    barred = plan.runtimes_lost
    if barred:
        out.print(
            f"For {_named(found.layers)} dense you lose {' and '.join(barred)}: "
            f"--keep-dense none gives {'it' if len(barred) == 1 else 'them'} back.",
            highlight=False,
        )


def _named(layers: tuple[int, ...]) -> str:
    if not layers:
        return "none"
    return f"layer{'s' if len(layers) > 1 else ''} {' and '.join(map(str, layers))}"


def _show_kinds(check: "Report") -> None:
    """A row per kind of text, the worst in the colour of what it means."""
    if isinstance(check, EncoderReport):
        show_hidden_texts("text", check.kinds)
        return
    colour = COLOURS[verdict(check.ratios).grade]
    rows = {}
    for name, kind in zip(told_apart(k.kind for k in check.kinds), check.kinds, strict=True):
        mark = Text(f"{kind.ratio:.2f}", colour if kind is check.worst else "")
        rows[name] = (
            f"{kind.perplexity_dense:.2f}",
            f"{kind.perplexity_moe:.2f}",
            mark,
            f"{kind.worst_window:.2f}",
            f"{100 * kind.top1_agreement:.0f} %",
        )
    table("text", rows, "dense", "MoE", "ratio", "worst window", "same token")


def _verdict(conversion: "Conversion") -> Iterator[str]:
    """What the check means, in sentences."""
    plan, check = conversion.plan, conversion.check
    if check is None:
        return
    if plan.exact == "logits":
        yield "The function is unchanged; train it further so that the copies come to differ."
        return
    if isinstance(check, EncoderReport):
        yield (
            f"Hidden states are off by up to {check.worst.error:.2g} σ, with a cosine of "
            f"{check.worst.cosine:.3f} ({escape(kind_name(check.worst.kind))}): what that costs, "
            "only the task that they are for tells."
        )
        return
    found, worst = verdict(check.ratios), check.worst
    if plan.exact == "nothing":
        yield f"Perplexity is up to {worst.ratio:.2f} × the dense model's until it is trained."
        return
    colour, where = COLOURS[found.grade], f"{worst.ratio:.2f} × the dense model's at worst"
    name = escape(kind_name(worst.kind))
    if found.grade == "fine":
        yield f"[{colour}]Fine as it is[/]: perplexity is {where} ({name})."
        return
    dose = f"about {found.tokens:,} tokens" if found.tokens else "millions of tokens"
    more = "--active" if plan.request.top_k is None else "--top-k"
    how = f"upcycle finetune {escape(str(conversion.out))} --data …"
    if not plan.source.arch.goes_on:
        how = "Train it as its card says,"
    word = "Broken" if found.grade == "broken" else "Heal it"
    yield (
        f"[{colour}]{word}[/]: perplexity is {where} ({name}). {how} with {dose}, or raise {more}."
    )
    if plan.recipe.name == "default" and plan.recipe.method.name == "split":
        yield "A split by --recipe thorough loses less, for several times the time."
    if found.add:
        yield (
            f"{escape(kind_name(found.add))} lost much more than the rest: add such text, "
            f"--calibration {escape(plan.recipe.calibration)}+FILE."
        )
