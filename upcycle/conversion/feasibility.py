"""What a plan that is whole may still come to grief on: settings, text, memory, disk."""

from upcycle.conversion.dry_run import planned_units
from upcycle.conversion.geometry import ALIGNMENT
from upcycle.conversion.plan import Plan
from upcycle.conversion.request import check_calibration, check_tokens
from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.machine import free_memory, total_memory
from upcycle.models.calibration import check_seq_len
from upcycle.models.companions import check_own_files
from upcycle.models.targets import TARGETS
from upcycle.models.text import text_files
from upcycle.models.tokens import load_tokenizer
from upcycle.models.workspace import check_out


def check_plan(plan: Plan, *, overwrite: bool, resume: bool) -> None:
    """
    Args:
        overwrite, resume: what may become of a former output.

    Raises:
        UpcycleError: the plan can't be carried out.
    """
    check_own_files(plan.source.folder)
    _check_width(plan)
    _check_feedback(plan)
    _check_ties(plan)
    _check_text(plan)
    _check_gradients(plan)
    _check_memory(plan)
    if plan.finished is not None:
        before = plan.finished.spec(plan.spec)
        units = planned_units(plan.source, plan.target, before, plan.design.dtype, plan.beside)
        plan.finished.check_layout([spec for unit in units.values() for spec in unit])
        check_own_files(plan.finished.folder)
    if plan.out is not None:
        room = plan.bytes + plan.aside_bytes()
        merged = plan.sources.merge.texts if plan.sources else []
        texts = [path for text in (plan.recipe.calibration, *merged) for path in text_files(text)]
        for source in plan.checkpoints:
            may = {"overwrite": overwrite, "resume": resume}
            check_out(plan.out, source.folder, room, beside=texts, **may)


def _check_width(plan: Plan) -> None:
    width = plan.source.arch.hidden_size
    if width % ALIGNMENT:
        raise UpcycleError(
            f"{plan.source.label} has hidden states of {width} channels, but grouped matrix "
            f"products, by which native MoEs compute their experts, need a multiple of {ALIGNMENT}"
        )


def _check_feedback(plan: Plan) -> None:
    asked = plan.recipe.compensate.params.get("feedback")
    if asked and not plan.design.feedback:
        why = f"{plan.source.arch.family} has a norm between its FFN and the hidden states"
        if not plan.design.sequential:
            why = f"{setting('sequential', False)} fits layers on the dense model's hidden states"
        if not plan.way.takes_feedback:
            why = "pruned copies are fitted to the dense FFN's output"
        raise UpcycleError(f"compensate.feedback={asked} has no effect: {why}, so give 0")


def _check_ties(plan: Plan) -> None:
    """Copies of which each must count 1 have hardly different scores, which some targets round."""
    design = plan.design
    if not plan.way.averages or design.combine != "sum":
        return
    if design.router_spread < design.routing.least_spread(design.dtype):
        raised = "" if TARGETS[plan.target].most_top_k == 1 else "raise `top_k`, or "
        raise UpcycleError(
            f"`top_k=1`: {plan.target} rounds the scores of copies that count 1 each to one and "
            f"the same below float32, so that all tokens would get the same copy: {raised}pass "
            "`dtype=float32`"
        )


def _check_text(plan: Plan) -> None:
    methods = plan.design.methods
    check_calibration(plan.recipe, methods, streams=plan.streams)
    if plan.streams:
        used = plan.way.used(methods, plan.design.geometry)
        # Each half of a sequence goes through one of an encoder-decoder's stacks.
        tokens = plan.fit_tokens // (2 if plan.source.arch.encoder_layers else 1)
        check_tokens(plan.recipe, used, tokens, plan.most_routed)
    fitted = plan.fit_tokens + plan.passage_tokens
    if fitted + plan.held_tokens:
        check_seq_len(plan.recipe.seq_len, plan.source.config)
        load_tokenizer(plan.source.folder, instead="" if fitted else ", or pass `check=none`")


def _check_gradients(plan: Plan) -> None:
    if not plan.needs_gradients:
        return
    arch, why = plan.source.arch, ""
    if arch.encoder:
        why = "is an encoder, which has no loss of the next token"
    elif arch.encoder_layers:
        why = "is an encoder-decoder, through which no gradients are taken back"
    elif arch.fields.get("num_kv_shared_layers"):
        why = "has layers that share keys and values, through which no gradients are taken back"
    if why:
        used = plan.way.used(plan.design.methods, plan.design.geometry).items()
        asking, bound = next(each for each in used if each[1].params.needs_gradients)
        cheaper = (
            f", or `{asking}.importance=output`" if hasattr(bound.params, "importance") else ""
        )
        raise UpcycleError(
            f"{setting(asking, getattr(plan.recipe, asking))} needs a backward pass, but "
            f"{plan.source.label} {why}: choose another{cheaper}"
        )


def _check_memory(plan: Plan) -> None:
    free, there_is = free_memory(plan.device), total_memory(plan.device)
    hidden = 4 * plan.fit_tokens * plan.source.arch.hidden_size
    if hidden > there_is:
        raise UpcycleError(
            f"`calibration_tokens={plan.recipe.calibration_tokens}` have hidden states of "
            f"{hidden / 1e9:.1f} GB, but there are {there_is / 1e9:.1f} GB of memory: give fewer"
        )
    if plan.check_bytes() > free:
        raise UpcycleError(
            f"the check holds the finished model, {plan.check_bytes() / 1e9:.1f} GB, but "
            f"{free / 1e9:.1f} GB of memory are free: pass `check=none` and evaluate where it fits"
        )
