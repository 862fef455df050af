"""The MoE parts of a loaded transformers model, found the same way whatever the target."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from upcycle.core.errors import UpcycleError

SELECTION_BIAS = ("e_score_correction_bias", "expert_bias")
"""Names of the tensor [E] that some architectures add to scores for selection alone."""
LAYER = re.compile(r"(?:(?P<stack>.+?)\.)?(?P<number>\d+)(\.|$)")


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
    def expert_parameters(self) -> int:
        """Of each expert."""
        return sum(p[0].numel() for p in self.experts.parameters())

    def matrices(self, expert: int) -> list[Tensor]:
        """An expert's, those first that tokens meet first."""
        return [self.first[expert], self.experts.down_proj[expert]]

    def selection(self, arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The selected experts [T, K] and their weights [T, K], by what the experts are called
        with."""
        return arguments[1], arguments[2]

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

    @property
    def most_top_k(self) -> int:
        """Experts that a token can be given."""
        return self.num_experts

    @contextmanager
    def all_on(self, gain: float) -> Iterator[None]:
        """Every expert for each token, with weight 1, for the time of the context: with its rows at
        zero a router weights all experts alike.

        Args:
            gain: a further factor on what the experts put out.
        """
        rows_ED = self.router.weight.data.clone()
        self.router.weight.data.zero_()
        with self._selecting_all(gain):
            yield
        self.router.weight.data.copy_(rows_ED)

    @contextmanager
    def _selecting_all(self, gain: float) -> Iterator[None]:
        selected = self.top_k
        setattr(self.chooser, self.top_k_field, self.num_experts)
        self.experts.down_proj.data.mul_(gain)
        yield
        setattr(self.chooser, self.top_k_field, selected)
        self.experts.down_proj.data.div_(gain)


@dataclass(frozen=True)
class LoneBlock(MoEBlock):
    """A layer whose router gives a token one expert, of several modules.

    `experts` are feed-forwards with `wi` and `wo`, and are called with tokens [T, D], a mask
    [T, 1, E] of the selected expert, which may lack it, and its weight [T, 1].
    """

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def expert_parameters(self) -> int:
        return sum(matrix.numel() for matrix in self.matrices(0))

    def matrices(self, expert: int) -> list[Tensor]:
        module = list(self.experts.values())[expert]
        return [module.wi.weight, module.wo.weight]

    def selection(self, arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        mask_TE, weight_T1 = arguments[1][:, 0], arguments[2]
        kept_T = mask_TE.any(-1)  # the others are beyond the expert's capacity
        return mask_TE[kept_T].argmax(-1, keepdim=True), weight_T1[kept_T]

    @property
    def top_k(self) -> int:
        return 1

    @property
    def most_top_k(self) -> int:
        return 1

    @contextmanager
    def _selecting_all(self, gain: float) -> Iterator[None]:
        def all_of_them(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return args[0], torch.ones_like(args[1]), gain * args[2]

        hook = self.experts.register_forward_pre_hook(all_of_them)
        yield
        hook.remove()


def moe_blocks(model: nn.Module) -> list[MoEBlock]:
    """The model's MoE layers in their order; a dense model has none.

    Raises:
        UpcycleError: a layer has experts, but no router that looks like one of transformers' own.
    """
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for name, module in model.named_modules():
        if match := LAYER.match(name):
            layer = (match["stack"] or "", int(match["number"]))
            if parts := _parts(model, name, module):
                found[layer] = found.get(layer, {}) | parts
    stacks = {stack: len(list(model.get_submodule(stack).children())) for stack, _ in found}
    return [
        _block(model, number + sum(_before(stack, stacks)), parts)
        for (stack, number), parts in found.items()
    ]


def _before(stack: str, stacks: dict[str, int]) -> Iterator[int]:
    """How many layers the stacks before one have, of an encoder-decoder's two."""
    return (stacks[other] for other in takewhile(lambda other: other != stack, stacks))


def _block(model: nn.Module, layer: int, parts: dict[str, Any]) -> MoEBlock:
    if "router" not in parts:
        raise UpcycleError(
            f"layer {layer} of {type(model).__name__} has experts, but no router that upcycle knows"
        )
    kind = LoneBlock if isinstance(parts["experts"], nn.ModuleDict) else MoEBlock
    return kind(layer, **parts)


def _parts(model: nn.Module, name: str, module: nn.Module) -> dict[str, Any]:
    """The fields of a block that a module of a layer fills, if it does."""
    kind = type(module).__name__.lower()
    if kind.endswith("topkrouter"):
        return {"router": module, "chooser": module}
    if kind.endswith("top1router"):
        return {"router": module.classifier, "chooser": module}
    if hasattr(module, "per_expert_scale"):
        # Gemma 4's makes what its linear layer sees of the residual stream.
        chooser = {"chooser": module.config, "top_k_field": "top_k_experts"}
        return {"router": module.proj} | chooser
    if _is_stacked(module) or (kind.endswith("experts") and isinstance(module, nn.ModuleDict)):
        return {"experts": module, "around": model.get_submodule(name.rpartition(".")[0])}
    return {}


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
    own = {block.top_k for block in blocks}
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
            see(place, *blocks[place].selection(args))

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
