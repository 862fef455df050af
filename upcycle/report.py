"""What a conversion leaves to read: upcycle.json for machines, a model card for people."""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import yaml

from upcycle.calibrate import texts
from upcycle.check import CheckReport
from upcycle.compensate import COMPENSATIONS
from upcycle.frontmatter import read_card
from upcycle.memory import peak_bytes
from upcycle.paths import local_path
from upcycle.perturb import PERTURBS
from upcycle.planning import Plan
from upcycle.registry import Method
from upcycle.router_init import ROUTERS
from upcycle.shared_experts import SHARED
from upcycle.split import SPLITS


@dataclass(frozen=True)
class Conversion:
    """A finished conversion."""

    plan: Plan
    out: Path
    check: CheckReport | None
    seconds: Mapping[str, float]
    peak_bytes: int
    damage: Sequence[float] | None = None
    """Where the layers to keep dense were measured: KL per layer, if only it is cut down."""


def versions() -> dict[str, str]:
    """What a bug report needs to name."""
    packages = ("torch", "transformers", "safetensors", "numpy", "scipy")
    return {
        "upcycle": version("upcycle"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def plan_summary(plan: Plan, *, measured: bool = False) -> dict[str, Any]:
    """A plan as plain values; `measured` as `peak_bytes` takes it."""
    arch, geometry = plan.source.arch, plan.geometry
    return {
        "source": plan.source.label,
        "family": arch.family,
        "target": plan.target,
        "targets": {name: why or "ok" for name, why in plan.targets.items()},
        "runtimes": {name: why or "ok" for name, why in plan.runtimes.items()},
        "method": plan.recipe.method.name,
        "layers": arch.num_layers,
        "dense_layers": list(plan.spec.dense_layers),
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.intermediate_size,
        "experts": geometry.num_experts,
        "top_k": geometry.top_k,
        "granularity": geometry.granularity,
        "expert_size": geometry.expert_size,
        "shared_size": geometry.shared_size,
        "active_ffn_ratio": plan.active_ffn_ratio,
        "params_dense": plan.params_dense,
        "params_total": plan.params_total,
        "params_active": plan.params_active,
        "bytes": plan.bytes,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "device": str(plan.device),
        "peak_memory_estimate": peak_bytes(plan, measured=measured),
        "check_memory_estimate": plan.check_bytes(),
        "calibration_tokens": plan.fit_tokens,
        "check_tokens": plan.held_tokens,
        "feedback": plan.feedback,
        "warnings": list(plan.warnings),
        "recipe": plan.recipe.settings(),
    }


def conversion_summary(conversion: Conversion) -> dict[str, Any]:
    """A conversion as plain values, without the per-layer record."""
    check = conversion.check
    return {
        "out": str(conversion.out),
        "plan": plan_summary(conversion.plan, measured=conversion.damage is not None),
        "check": None
        if check is None
        else asdict(check)
        | {"perplexity_ratio": check.perplexity_ratio, "dead_experts": check.dead_experts},
        "seconds": {stage: round(s, 3) for stage, s in conversion.seconds.items()},
        "peak_memory": conversion.peak_bytes,
        "damage": conversion.damage,
    }


def report_json(conversion: Conversion, layers: Iterable[dict[str, Any]]) -> str:
    """upcycle.json: all that was decided and measured; each layer's permutation lists the dense
    neurons in their new order, shared first, then expert by expert (of a split that is no
    partition, with some of them twice or more and some left out)."""
    source = conversion.plan.source
    report = conversion_summary(conversion) | {
        "versions": versions(),
        "source": {
            "name": source.label,
            "revision": source.revision,
            "fingerprint": source.fingerprint(),
        },
        "layers": list(layers),
    }
    return json.dumps(report) + "\n"


def papers(plan: Plan) -> list[str]:
    """The papers behind the methods that a plan uses, each once."""
    recipe = plan.recipe
    used: list[Method[Any]] = []
    if recipe.router is not None:
        used.append(ROUTERS[recipe.router.name])
    if recipe.method.name in PERTURBS:
        used.append(PERTURBS[recipe.method.name])
    if plan.compensates:
        used.append(COMPENSATIONS[recipe.compensate.name])
    if recipe.splits:
        used.append(SPLITS[recipe.split.name])
        if plan.geometry.shared_size:
            used.append(SHARED[recipe.shared_by.name])
    listed = [recipe.paper, *(method.paper for method in used)]
    return sorted({paper for paper in listed if paper.startswith("arXiv")})


def model_card(conversion: Conversion) -> str:
    """README.md of the output, with front matter for the hub."""
    plan = conversion.plan
    front = read_card(plan.source.folder)
    if plan.source.revision is not None:
        front["base_model"] = [plan.source.label]
    front |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "mixture-of-experts", "upcycle", plan.target, plan.recipe.method.name],
    }
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    return environment.from_string(CARD).render(
        front=yaml.safe_dump(front, sort_keys=False),
        plan=plan,
        name=_public_name(plan.source.label),
        check=conversion.check,
        text="+".join(_public_name(text) for text in texts(plan.recipe.calibration)),
        papers=papers(plan),
        compensation=COMPENSATIONS[plan.recipe.compensate.name],
        version=version("upcycle"),
    )


def _public_name(source: str) -> str:
    """A hub's name as it is; of a local path only the last part, which may be published."""
    return Path(source).resolve().name if local_path(source).exists() else source


CARD = """\
---
{{ front }}---

# {{ name.split("/")[-1] }} as a Mixture-of-Experts

Made from `{{ name }}` by upcycle {{ version }}:
a native `{{ plan.target }}` checkpoint, which plain transformers loads.

{% if plan.recipe.copies %}
Every layer's FFN was copied {{ plan.geometry.copies }} times, into {{ plan.geometry.num_experts }} experts\
{% if plan.geometry.granularity > 1 %}, {{ plan.geometry.granularity }} shards a copy{% endif %}
{% if plan.recipe.method.name != "copy" %}, \
then changed by `{{ plan.recipe.method.name }}`{% endif %};
{{ plan.geometry.top_k }} are active per token. It is meant to be trained further.
{% else %}
{% if plan.recipe.prunes %}
Every layer's FFN was copied into {{ plan.geometry.num_experts }} experts, each pruned to the \
{{ plan.geometry.expert_size }} of {{ plan.source.arch.intermediate_size }} neurons that put out most \
on its own tokens; one is active per token.
{% else %}
Every layer's FFN was cut into {{ plan.geometry.num_experts }} experts of \
{{ plan.geometry.expert_size }} neurons, of which {{ plan.geometry.top_k }} are active per token\
{% if plan.geometry.shared_size %}, beside a shared expert of \
{{ plan.geometry.shared_size }} that are always on{% endif %}.
{% if not plan.partitions %}
These experts may hold the same neuron, and some neurons of the dense model are in none.
{% endif %}
{% endif %}
{% if plan.compensates %}
Compensation, `{{ plan.recipe.compensate.name }}`: {{ compensation.summary }}\
{% if plan.feedback %}, and to make up for {{ "%.0f" | format(100 * plan.feedback) }} % of what \
the layers before have lost{% endif %}.
All other weights are the dense model's.
{% endif %}
{% endif %}
{% if plan.spec.dense_layers %}
Kept dense: layer{{ "s" if plan.spec.dense_layers | length > 1 }} \
{{ plan.spec.dense_layers | join(", ") }}.
{% endif %}

| | dense | this model |
|---|---|---|
| parameters | {{ "{:,}".format(plan.params_dense) }} | {{ "{:,}".format(plan.params_total) }} |
| active per token | {{ "{:,}".format(plan.params_dense) }} \
| {{ "{:,}".format(plan.params_active) }} |
| active FFN | 100 % | {{ "%.0f" | format(100 * plan.active_ffn_ratio) }} % |
{% if check %}
| perplexity | {{ "%.2f" | format(check.perplexity_dense) }} \
| {{ "%.2f" | format(check.perplexity_moe) }} |
| KL to the dense model | 0 | {{ "%.4f" | format(check.kl) }} nats |
| same next token | 100 % | {{ "%.1f" | format(100 * check.top1_agreement) }} % |

Measured on {{ "{:,}".format(check.tokens) }} tokens of the calibration text \
(`{{ text }}`) that were held back, in windows of {{ check.window }}.
{% if check.perplexity_ratio > 1.1 %}

**This model has lost quality and needs further training before use.**
{% endif %}
{% endif %}

Recipe: `{{ plan.recipe.name }}`, method `{{ plan.recipe.method.name }}`, \
router `{{ plan.recipe.router.name }}`\
{% if plan.recipe.splits %}, split `{{ plan.recipe.split.name }}`{% endif %}.
{% for departure in plan.recipe.departures %}
- Departs from its paper: {{ departure }}
{% endfor %}
All settings, where each neuron comes from and the measurements are in `upcycle.json`.

Runtimes beside transformers, as upcycle {{ version }} knows them:

{% for runtime, why in plan.runtimes.items() %}
- {{ runtime }}: {{ why or "ok" }}
{% endfor %}
{% if papers %}

Methods: {{ papers | join(", ") }}.
{% endif %}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""
