"""The MoE parts of a loaded transformers model, found the same way whatever the target."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from upcycle.core.errors import UpcycleError

SELECTION_BIAS = ("e_score_correction_bias", "expert_bias")
"""Names of the tensor [E] that some architectures add to scores for selection alone."""


@dataclass(frozen=True)
class MoEBlock:
    """One layer's router and experts."""

    layer: int
    router: Any
    """With `weight` [E, D], called with what it makes logits of."""
    experts: Any
    """With `gate_up_proj` [E, 2 M, D] or, without gates, `up_proj` [E, M, D]; `down_proj` [E, D, M]
    and `act_fn`. Called with tokens [T, D], the selected experts [T, K] and their weights
    [T, K]."""
    around: Any
    """The module that holds the experts."""
    chooser: Any
    """Where `top_k` is, by the name of `top_k_field`."""
    top_k_field: str = "top_k"

    @property
    def num_experts(self) -> int:
        return len(self.experts.down_proj)

    @property
    def first(self) -> Any:
        """The experts' stacked matrices that tokens meet first."""
        gated = hasattr(self.experts, "gate_up_proj")
        return self.experts.gate_up_proj if gated else self.experts.up_proj

    @property
    def factor(self) -> float:
        """What the block multiplies by what the experts put out together; most classes have it in
        the weights."""
        return float(getattr(self.around, "routed_scaling_factor", 1.0))

    @property
    def bias_place(self) -> tuple[Any, str] | None:
        """The module that holds the selection bias, where there is one, and its name there."""
        # ERNIE's routers keep it in a module of its own, LFM2's layers beside the router.
        modules = (self.router, getattr(self.router, "moe_statics", None), self.around)
        places = ((module, name) for module in modules for name in SELECTION_BIAS)
        return next((place for place in places if getattr(*place, None) is not None), None)

    @property
    def selection_bias(self) -> Tensor | None:
        """The bias [E] that is added to scores for selection alone, where there is one; the model's
        own memory."""
        if self.bias_place is None:
            return None
        bias_E: Tensor = getattr(*self.bias_place).view(-1)
        return bias_E

    @property
    def top_k(self) -> int:
        return int(getattr(self.chooser, self.top_k_field))

    def select(self, top_k: int) -> None:
        """Let each token have so many experts from now on."""
        setattr(self.chooser, self.top_k_field, top_k)


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
            routers[layer] = (module, module, "top_k")
        elif hasattr(module, "per_expert_scale"):
            # Gemma 4's makes what its linear layer sees of the residual stream.
            routers[layer] = (module.proj, module.config, "top_k_experts")
        elif _is_stacked(module):
            experts[layer] = module
            around[layer] = model.get_submodule(name.rpartition(".")[0])
    for layer in sorted(experts.keys() - routers.keys()):
        raise UpcycleError(
            f"layer {layer} of {type(model).__name__} has experts, but no router that upcycle knows"
        )
    return [
        MoEBlock(layer, router, experts[layer], around[layer], chooser, top_k)
        for layer, (router, chooser, top_k) in routers.items()
    ]


def _is_stacked(module: nn.Module) -> bool:
    down_EDM = getattr(module, "down_proj", None)
    return isinstance(down_EDM, nn.Parameter) and down_EDM.dim() == 3


@contextmanager
def selecting(model: nn.Module, top_k: int) -> Iterator[None]:
    """The model as if its config.json had another number of experts per token.

    Every module that keeps the number gets the other one: in some architectures the block selects,
    not the router.

    Raises:
        UpcycleError: while it runs, it selects another number all the same.
    """
    blocks = moe_blocks(model)
    own = {block.router.top_k for block in blocks}
    keep: list[Any] = [m for m in model.modules() if getattr(m, "top_k", None) in own]
    before = [module.top_k for module in keep]

    def check(_: int, chosen_TK: Tensor, __: Tensor) -> None:
        if chosen_TK.shape[1] != top_k:
            raise UpcycleError(
                f"{type(model).__name__} keeps its number of experts per token where upcycle does "
                f"not know of it: write {top_k} into a copy's config.json instead"
            )

    try:
        for module in keep:
            module.top_k = top_k
        with watch_selections(blocks[:1], check):
            yield
    finally:
        for module, number in zip(keep, before, strict=True):
            module.top_k = number


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


def text_modules(model: Any) -> Iterator[nn.Module]:
    """Modules that text passes through; of a model of several parts, those of its text model."""
    if model.config is model.config.get_text_config():
        yield from model.modules()
    else:
        yield from model.get_decoder().modules()
        yield model.get_output_embeddings()
