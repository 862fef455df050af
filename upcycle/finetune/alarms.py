"""What goes wrong in a run, said while it goes on: pure functions of the lines of its log.

A loss or a gradient that is no number ends a run at once; what is here goes on, and is worth a
look. Each is said once in a run, of a text once per text.
"""

import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from upcycle.core.flags import setting
from upcycle.models.record.training import Alarm

JUMP = 10.0
"""The norm of a step's gradient over the median of the steps before. In the runs of SmolLM2 that
were looked at, of up to 64 steps of one sequence, no step came to four; beyond ten one is no
chance."""
RECENT = 64
"""Steps that the median is of: the norm falls during a run, so old steps say little."""
FEWEST = 8
"""Steps before which there is no median to speak of."""
STARVED = 0.01
"""Share of its fair load under which an expert is out of use: gradients come with tokens, so one
with so few hardly learns its way back."""
MORE_STARVED = 0.01
"""Share of all experts that fell out of use since the run began, at least one expert: a few of many
come and go at the edge of the threshold."""
HALFWAY = 0.5
"""Of the way, by ratio, from the imbalance before training to the worst there is, all tokens at the
same experts. In a short healing of SmolLM2, without a balancing loss, it went 5 % of that way."""
WORSE = 1.02
"""Perplexity of a text over that before training. The tokens are the same ones, so a difference is
no chance of sampling; what the first steps lose and win back is less."""

Row = dict[str, Any]


def new_alarms(log: Sequence[Row], known: Collection[str]) -> list[Alarm]:
    """What the last line of a log gives cause for.

    Args:
        log: the lines up to now as plain values, that of the validation before training first.
        known: what alarms were given about before.
    """
    *before, row = log[-RECENT - 1 :]
    found = [*_gradient(row, before), *_routing(row, log[0]), *_texts(row, log[0])]
    return [alarm for alarm in found if alarm.about not in known]


def _gradient(row: Row, before: Sequence[Row]) -> Iterator[Alarm]:
    norms = [r["grad_norm"] for r in before if math.isfinite(r.get("grad_norm", math.inf))]
    norm = row.get("grad_norm", math.inf)
    if len(norms) < FEWEST or not math.isfinite(norm):
        return
    usual = statistics.median(norms)
    if norm > JUMP * usual:
        yield Alarm(
            row["step"],
            "gradient norm",
            f"the gradient's norm was {norm:.3g}, {norm / usual:.0f} times the median of the "
            f"steps before: lower {setting('lr')}, or look at what the text has there",
        )


def _routing(row: Row, first: Row) -> Iterator[Alarm]:
    if "routing" not in row:
        return
    now, then = row["routing"], first["routing"]
    more = now["starved"] - then["starved"]
    if more >= max(1, MORE_STARVED * now["experts"]):
        yield Alarm(
            row["step"],
            "experts out of use",
            f"{now['starved']} of {now['experts']:,} experts get less than {STARVED:.0%} of their "
            f"fair share of the held-out tokens, {then['starved']} before training: raise "
            f"{setting('balance')}, or lower {setting('router_lr')}",
        )
    room = math.log(now["worst_imbalance"] / then["imbalance"])
    if room > 0 and math.log(now["imbalance"] / then["imbalance"]) > HALFWAY * room:
        yield Alarm(
            row["step"],
            "imbalance",
            f"the busiest expert gets {now['imbalance']:.2f} times its fair share of the held-out "
            f"tokens, {then['imbalance']:.2f} before training ({now['worst_imbalance']:.2f} is "
            f"the worst): raise {setting('balance')}, or lower {setting('router_lr')}",
        )


def _texts(row: Row, first: Row) -> Iterator[Alarm]:
    for name, perplexity in row.get("texts", {}).items():
        then = first["texts"][name]
        if perplexity > WORSE * then:
            yield Alarm(
                row["step"],
                f"perplexity of {name}",
                f"the perplexity of {name} is {perplexity:.4g}, {then:.4g} before training: "
                f"train on more of such text, raise {setting('distill')} or lower {setting('lr')}",
            )
