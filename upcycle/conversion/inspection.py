"""What a model is, which methods there are, which machine this is: facts for people to look at."""

import os
import platform
from typing import Any

import psutil
import torch

from upcycle.conversion.compensate import COMPENSATIONS
from upcycle.conversion.fit import FITS
from upcycle.conversion.geometry import legal_parts
from upcycle.conversion.recipe import Recipe
from upcycle.conversion.rest import RESTS
from upcycle.conversion.target import refusals
from upcycle.conversion.ways import WAYS
from upcycle.core.registry import describe
from upcycle.core.versions import versions
from upcycle.evaluation.inspection import has_experts, inspect_dense, inspect_moe
from upcycle.models.checkpoint import locate
from upcycle.models.opening import open_located
from upcycle.models.targets import TARGETS
from upcycle.router_init import ROUTERS
from upcycle.router_init.gates import GATES
from upcycle.split import SPLITS
from upcycle.split.copies import PERTURBS
from upcycle.split.shared import SHARED


def inspect_model(model: str, *, revision: str | None = None) -> dict[str, Any]:
    """Facts about a dense model or an MoE, from its config and headers; of a dense one, what it
    can become.

    Raises:
        UpcycleError: it is not a model that upcycle can read.
    """
    found = locate(model, revision)
    if found is not None and has_experts(found):
        return inspect_moe(model, found)
    source = open_located(model, found)
    arch = source.arch
    targets = refusals(arch, Recipe())
    return inspect_dense(source) | {
        "experts_possible": [n for n in legal_parts(arch.intermediate_size) if 1 < n <= 512],
        "traits": {trait.value: why for trait, why in arch.traits.items()},
        "targets": {name: why or "ok" for name, why in targets.items()},
    }


def registered() -> dict[str, Any]:
    """Every registered method with its parameters and their defaults, every way and every target:
    what catalogue.json holds."""
    registries = (SPLITS, SHARED, ROUTERS, FITS, COMPENSATIONS, PERTURBS, GATES, RESTS)
    return {"methods": describe(registries), "ways": list(WAYS), "targets": list(TARGETS)}


def describe_environment() -> dict[str, str]:
    """Versions and the machine."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return versions() | {
        "system": platform.platform(),
        "cpus": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "gpus": ", ".join(gpus) or "none",
    }
