"""The plug-ins of training that a request names, with a model's facts held against them."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from upcycle.core.binding import bind
from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.registry import describe
from upcycle.core.settings import Choice
from upcycle.finetune.data import Data
from upcycle.finetune.gating import GATINGS
from upcycle.finetune.gating.base import Gater
from upcycle.finetune.partition import Dealer
from upcycle.finetune.router_losses import ROUTER_LOSSES
from upcycle.finetune.router_losses.base import Facts
from upcycle.finetune.router_terms import RouterTerms, Term
from upcycle.finetune.routers import Scale
from upcycle.finetune.settings import Training
from upcycle.models.blocks import MoEBlock
from upcycle.models.hosted import target_of
from upcycle.models.record.file import Made, Record
from upcycle.split import SPLITS


def registered() -> list[dict[str, Any]]:
    """What catalogue.json holds."""
    return describe((ROUTER_LOSSES, GATINGS))


def facts_of(
    config: Any, record: Record, blocks: list[MoEBlock], data: Data, accelerator: Accelerator
) -> Facts:
    """What plug-ins may ask of a model and a run.

    Args:
        record: the model's upcycle.json.
    """
    target = target_of(config)
    return Facts(
        score="softmax" if target is None else target.routing.score,
        experts=blocks[0].num_experts if blocks else 0,
        top_k=blocks[0].top_k if blocks else 0,
        texts=len(data.used),
        parts=add_up(record),
        sharded=accelerator.distributed_type == DistributedType.FSDP,
    )


def add_up(record: Record) -> bool:
    """Whether a model's experts are parts of an FFN, each of its neurons in one of them."""
    if not isinstance(record, Made) or record.plan.method != "split":
        return False
    return SPLITS[record.plan.recipe.split.name].partitions


def check_plugins(settings: Training, facts: Facts) -> None:
    """Refuse what can't work, before there is a model.

    Raises:
        UpcycleError: a plug-in that the request names can't work.
    """
    for name, choice in settings.weighed_router_losses.items():
        bound = bind(ROUTER_LOSSES, Choice(name=name, **choice.params))
        why_not = bound.method.refusal(facts, bound.params)
        if why_not:
            given = setting(settings.field_of(name), choice.weight)
            raise UpcycleError(f"{given} has no effect: {why_not}")
    if settings.train == "partition" and facts.sharded:
        raise UpcycleError(
            "`train=partition` with FSDP, where no process holds all neurons of a layer: use data "
            "parallelism"
        )
    if settings.gating is not None:
        _check_gating(settings, facts, settings.gating)


def _check_gating(settings: Training, facts: Facts, gating: Choice) -> None:
    bound, given = bind(GATINGS, gating), setting("gating", gating)
    if facts.top_k == facts.experts:
        raise UpcycleError(
            f"{given} changes which experts a token gets, but in this model it gets all "
            f"{facts.experts}: leave it out"
        )
    if settings.dense_router_gradient and not bound.method.runs_own:
        raise UpcycleError(
            f"{given} has a gradient of its own: give {setting('dense_router_gradient', False)}"
        )


def router_terms(
    settings: Training,
    facts: Facts,
    blocks: list[MoEBlock],
    scales: list[Scale],
    score: Callable[[Tensor], Tensor],
) -> RouterTerms:
    """The losses of routers that are asked for."""
    terms = {}
    for name, choice in settings.weighed_router_losses.items():
        terms[name] = Term(bind(ROUTER_LOSSES, Choice(name=name, **choice.params)), choice.weight)
    return RouterTerms(terms, blocks, scales, score, facts.texts, settings.seed)


def gater_for(
    settings: Training,
    facts: Facts,
    blocks: list[MoEBlock],
    scales: list[Scale],
    score: Callable[[Tensor], Tensor],
) -> Gater | Dealer | None:
    """The gating that is asked for, if one is; or what stands in for one."""
    if settings.train == "partition":
        return Dealer(blocks, score)
    if settings.gating is None:
        return None
    spreads = [scale.spread or 1.0 for scale in scales]
    return Gater(bind(GATINGS, settings.gating), blocks, spreads, score, facts.parts)
