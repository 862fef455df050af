"""The MoE parts of a loaded transformers model, found the same way whatever the target."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from upcycle.core.errors import UpcycleError

SELECTION_BIAS = ("e_score_correction_bias", "expert_bias")
"""Names of the buffer [E] that some architectures add to scores for selection alone."""


@dataclass(frozen=True)
class MoEBlock:
    """One layer's router and experts."""

    layer: int
    router: Any
    """With `weight` [E, D] and `top_k`."""
    experts: Any
    """With `gate_up_proj` [E, 2 M, D] or, without gates, `up_proj` [E, M, D]; `down_proj` [E, D, M]
    and `act_fn`. Called with tokens [T, D], the selected experts [T, K] and their weights
    [T, K]."""
    around: Any = None
    """The module that holds both."""

    @property
    def num_experts(self) -> int:
        return len(self.experts.down_proj)

    @property
    def first(self) -> Any:
        """The experts' stacked matrices that tokens meet first."""
        gated = hasattr(self.experts, "gate_up_proj")
        return self.experts.gate_up_proj if gated else self.experts.up_proj

    @property
    def selection_bias(self) -> Tensor | None:
        """The bias [E] that is added to scores for selection alone, where there is one."""
        for module in (self.router, self.around):
            for name in SELECTION_BIAS:
                bias_E: Tensor | None = getattr(module, name, None)
                if bias_E is not None:
                    return bias_E
        return None


def moe_blocks(model: nn.Module) -> list[MoEBlock]:
    """The model's MoE layers in their order; a dense model has none.

    Raises:
        UpcycleError: a layer has experts, but no router that looks like one of transformers' own.
    """
    routers, experts, around = {}, {}, {}
    for name, module in model.named_modules():
        layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        if layer is None:
            continue
        if type(module).__name__.lower().endswith("topkrouter"):
            routers[layer] = module
        elif _is_stacked(module):
            experts[layer] = module
            around[layer] = model.get_submodule(name.rpartition(".")[0])
    for layer in sorted(experts.keys() - routers.keys()):
        raise UpcycleError(
            f"layer {layer} of {type(model).__name__} has experts, but no router that upcycle knows"
        )
    return [
        MoEBlock(layer, router, experts[layer], around[layer]) for layer, router in routers.items()
    ]


def _is_stacked(module: nn.Module) -> bool:
    down_EDM = getattr(module, "down_proj", None)
    return isinstance(down_EDM, nn.Parameter) and down_EDM.dim() == 3


@contextmanager
def watch_selections(
    blocks: list[MoEBlock], see: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    """Tell `see` of the place in `blocks`, the selected experts [T, K] and their weights [T, K],
    whenever a block runs.

    Read from what the experts are called with, which all targets have in common; what routers
    return differs between versions of transformers.
    """
    hooks = []
    for place, block in enumerate(blocks):

        def watch(_: nn.Module, args: tuple[Tensor, ...], place: int = place) -> None:
            see(place, args[1], args[2])

        hooks.append(block.experts.register_forward_pre_hook(watch))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
