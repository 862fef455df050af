"""How training went."""

from collections.abc import Sequence

from upcycle import charts
from upcycle.page.section import Facts, Section
from upcycle.page.words import digits

CURVES = (
    ("Training loss", "loss", None),
    ("Validation perplexity", "perplexity", "validation"),
    ("KL to the dense model, in nats", "kl", "validation"),
    ("Busiest expert, × its fair share", "imbalance", None),
)
"""Title, name in a line of the log, and the group of the line that holds it."""


def curves(log: Sequence[Facts]) -> Section:
    """The curves of `upcycle finetune`."""
    panels = []
    for title, name, group in CURVES:
        parts = [(line["step"], line.get(group, {}) if group else line) for line in log]
        chart = charts.curve([(step, part[name]) for step, part in parts if name in part])
        if chart is not None:
            ends = f"{digits(chart.first)} at first, {digits(chart.last)} at last"
            panels.append({"title": title, "chart": chart, "text": f"{title}: {ends}."})
    if not panels:
        return None
    rates = [line["tokens_per_second"] for line in log if "tokens_per_second" in line]
    rate = f", {digits(sum(rates) / len(rates))} tokens per second" if rates else ""
    return {"note": f"{log[-1]['step']:,} steps{rate}.", "panels": panels}
