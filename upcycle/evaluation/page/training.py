"""How training went."""

from collections.abc import Callable, Sequence

from upcycle.core.flags import as_flags
from upcycle.evaluation.page import charts
from upcycle.evaluation.page.section import Section
from upcycle.evaluation.page.words import digits
from upcycle.models.train_log import LogLine

CURVES: dict[str, Callable[[LogLine], float | None]] = {
    "Training loss": lambda line: line.loss,
    "Validation perplexity": lambda line: line.validation.perplexity if line.validation else None,
    "KL to the dense model, in nats": lambda line: line.validation.kl if line.validation else None,
    "Busiest expert, × its fair share": lambda line: line.imbalance,
}
"""By title, what of a line of the log is drawn."""


def curves(log: Sequence[LogLine]) -> Section:
    """The curves of `upcycle finetune`; a level one says nothing."""
    panels = []
    for title, read in CURVES.items():
        points = [(line.step, value) for line in log if (value := read(line)) is not None]
        chart = charts.curve(points) if len({value for _, value in points}) > 1 else None
        if chart is not None:
            ends = f"{digits(chart.first)} at first, {digits(chart.last)} at last"
            panels.append({"title": title, "chart": chart, "text": f"{title}: {ends}."})
    if not panels:
        return None
    rates = [line.tokens_per_second for line in log if line.tokens_per_second is not None]
    rate = f", {digits(sum(rates) / len(rates))} tokens per second" if rates else ""
    alarms = "".join(
        f" Alarm after step {alarm.step:,}: {as_flags(alarm.says)}."
        for line in log
        for alarm in line.alarms
    )
    return {"note": f"{log[-1].step:,} steps{rate}.{alarms}", "panels": panels}
