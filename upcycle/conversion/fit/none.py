"""None: split and router stay as closed forms made them."""

from upcycle.conversion.fit.base import Experts, Lesson, fit
from upcycle.core.registry import Params


@fit("none", learns=(), summary="split and router stay as they were made", paper="baseline")
def keep(experts: Experts, lesson: Lesson, params: Params) -> Experts:
    return experts
