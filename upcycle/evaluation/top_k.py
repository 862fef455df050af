"""The same checkpoint at another number of experts per token, and what that does to their sum."""

from pathlib import Path
from typing import Any

from upcycle.core.errors import UpcycleError
from upcycle.models.blocks import MoEBlock
from upcycle.models.record.conversion import PlanPart
from upcycle.models.record.file import RECORD, Made, read_record
from upcycle.models.targets import TARGETS


def check_top_ks(wanted: list[int], blocks: list[MoEBlock], model: str) -> None:
    """The model can select so many experts.

    Raises:
        UpcycleError: it can't.
    """
    if wanted and not blocks:
        raise UpcycleError(f"`top_k`: {model} is dense, without experts to select")
    for top_k in wanted:
        most = min(block.most_top_k for block in blocks)
        if most < top_k <= min(block.num_experts for block in blocks):
            raise UpcycleError(
                f"`top_k={top_k}`: the class of {model} gives a token at most {most} of its experts"
            )
        fewest = min(block.num_experts for block in blocks)
        if not 1 <= top_k <= fewest:
            raise UpcycleError(f"`top_k={top_k}`: {model} has {fewest} experts: give 1 to {fewest}")


def made_at(folder: Path) -> PlanPart | None:
    """What upcycle made the model as, if it did."""
    path = folder / RECORD
    record = read_record(path) if path.is_file() else None
    return record.plan if isinstance(record, Made) else None


def sum_note(plan: PlanPart | None, config: Any, top_k: int) -> str:
    """Why experts do not add up to what they do at the top-k that their gain was made for; empty if
    they do, or if nothing is known of the model.

    Args:
        config: of the model that runs.
        top_k: that it is run at.
    """
    if plan is None or plan.target not in TARGETS or top_k == plan.top_k:
        return ""
    always = TARGETS[plan.target].routing.renormalises == "always"
    renormalised = always or bool(getattr(config, "norm_topk_prob", False))
    if plan.method == "split":  # whose experts are added up; copies each stand for the whole FFN
        if not renormalised:
            return ""
        return (
            f"{plan.target} divides weights by their sum, and the gain of {plan.top_k} is right at "
            f"{plan.top_k} experts only: at {top_k} each counts {plan.top_k / top_k:.3g} times as "
            f"much; convert with `top_k={top_k}` for one that is right there"
        )
    if not renormalised:
        return (
            f"copies have plain weights, which are right at {plan.top_k} per token only: at "
            f"{top_k} they come to {top_k / plan.top_k:.3g} times the FFN"
        )
    if top_k % plan.granularity:
        return f"{top_k} is no multiple of {plan.granularity} shards: tokens get parts of copies"
    return ""
