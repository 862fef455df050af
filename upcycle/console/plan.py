"""A plan: what would be built."""

from typing import TYPE_CHECKING

from upcycle.console.output import out, show_notes, table
from upcycle.core.words import count, size

if TYPE_CHECKING:
    from upcycle.conversion.plan import Plan


def show_plan(plan: "Plan") -> None:
    """What would be built, and what each target says."""
    from upcycle.conversion.memory import peak_bytes

    recipe = plan.recipe
    out.print(plan.way.usage(plan.design.geometry), highlight=False)
    table(
        f"{plan.source.label} → {plan.target}",
        {
            "method": method(plan),
            "experts": _experts(plan) + _chosen(plan),
            "layers": layers(plan),
            "active FFN": f"{100 * plan.active_ffn_ratio:.0f} % of the dense model's",
            "parameters": f"{count(plan.params_total)} (dense {count(plan.params_dense)})",
            "active per token": count(plan.params_active),
            "combine": "unweighted sum" if plan.design.combine == "sum" else "weighted mean",
            "output": f"{size(plan.bytes)} in {str(plan.design.dtype).removeprefix('torch.')}",
            "calibration": f"{plan.fit_tokens:,} tokens of {recipe.calibration}"
            if plan.streams
            else "not needed",
            **_backward_pass(plan),
            "memory": f"about {size(peak_bytes(plan))}"
            + (f", the check {size(plan.check_bytes())}" if recipe.check != "none" else ""),
        },
    )
    table("targets", {name: why or "ok" for name, why in plan.targets.items()})
    table("runtimes", {name: why or "ok" for name, why in plan.runtimes.items()})
    show_notes(plan.warnings)


def show_warnings(plan: "Plan") -> None:
    """What is to be known before a conversion begins."""
    refusals = ((name, why) for name, why in plan.runtimes.items() if why)
    show_notes(plan.warnings)
    show_notes(f"{name} does not run this {plan.target}: {why}" for name, why in refusals)


def method(plan: "Plan") -> str:
    design = plan.design
    refit = f", compensation {design.methods.compensate.name}" if design.compensates else ""
    order = ", layer by layer" if design.sequential else ""
    return f"{plan.way.made(design)}{refit}{order}"


def _backward_pass(plan: "Plan") -> dict[str, str]:
    if not plan.needs_gradients:
        return {}
    aside = size(plan.gradient_bytes)
    return {
        "backward pass": "through the dense model, one layer's weights in memory at a time, "
        f"{aside} put aside on the disk"
    }


def _experts(plan: "Plan") -> str:
    geometry = plan.design.geometry
    copies = f" ({geometry.copies} copies)" if geometry.granularity > 1 else ""
    shared = f", and {geometry.shared_size} always on" if geometry.shared_size else ""
    return (
        f"{geometry.top_k} of {geometry.num_experts}{copies} per token, {geometry.expert_size} "
        f"neurons each{shared}"
    )


def _chosen(plan: "Plan") -> str:
    if plan.request.experts is not None or not plan.way.fewer:
        return ""
    number = plan.design.geometry.num_experts
    return f" (--experts {number} by default: more lose less, fewer are {plan.way.fewer})"


def layers(plan: "Plan") -> str:
    dense = plan.spec.dense_layers
    if plan.undecided:
        return f"{len(plan.moe_layers)}, less those that convert measures to be better kept dense"
    kept = f", {len(dense)} kept dense ({', '.join(map(str, dense))})" if dense else ""
    return f"{len(plan.moe_layers)} converted{kept}"
