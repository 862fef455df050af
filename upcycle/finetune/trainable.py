"""Which parameters train, in the groups that people speak of."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.finetune.partition import AFFINITY
from upcycle.finetune.routers import Scale
from upcycle.finetune.settings import Train, Training
from upcycle.models.blocks import MoEBlock, text_modules

NORMS, PARTS = "norms, embeddings", "other parts"
GROUPS = ("router", "experts", "shared experts", "attention", "dense FFNs", NORMS, PARTS)
"""The last are what text does not pass through, as a vision tower: nothing could train there."""
PARTITION = "which neuron is whose"
"""A group that no checkpoint has."""
FFNS = (".mlp.", ".feed_forward.", ".mixer.up_proj.", ".mixer.down_proj.")
MIXERS = (".self_attn.", ".linear_attn.", ".conv.", ".mamba.", ".mixer.")
"""Attention, and what some layers have in its place."""
PAST_MODULES = (".mamba.out_proj.weight", ".mixer.out_proj.weight")
"""What Mamba's kernels read past its module, where a change of low rank would have no effect."""
TRAINS: dict[Train, tuple[str, ...]] = {
    "router": ("router",),
    "partition": ("router", PARTITION),
    "experts": ("experts", "shared experts"),
    "moe": ("router", "experts", "shared experts"),
    "all": GROUPS[:-1],
}


@dataclass(frozen=True)
class Member:
    """A parameter of the plain model, before any wrapper."""

    name: str
    group: str
    scale: float
    """What its learning rate is multiplied by."""
    size: int
    dimensions: int

    @property
    def part(self) -> str:
        """What begins to move at once: the router, or one of `settings.Part`; among the norms
        whatever else is no matrix."""
        if self.group in ("router", "attention"):
            return self.group
        if self.group == NORMS:
            return "embeddings" if self.dimensions == 2 else "norms"
        return "ffn"


@dataclass(frozen=True)
class Trained:
    """A parameter that trains: a member itself, or a low-rank change of it."""

    parameter: nn.Parameter
    member: Member
    scale: float


Members = dict[int, Member]
"""By the identity of the parameter."""
Groups = dict[str, dict[str, int]]
"""Per group, how many parameters it has ("parameters"), and how many train ("trained")."""


def members(model: nn.Module, blocks: list[MoEBlock], scales: list[Scale]) -> Members:
    """All parameters that hold anything."""
    text = {id(p) for module in text_modules(model) for p in module.parameters()}
    parts = {id(p): (PARTS, 1.0) for p in model.parameters() if id(p) not in text}
    for block, scale in zip(blocks, scales, strict=True):
        parts |= {id(p): ("router", scale.router) for p in block.router.parameters()}
        parts |= {id(p): ("experts", 1.0) for p in block.experts.parameters()}
        parts[id(block.experts.down_proj)] = ("experts", scale.down_proj)
        if hasattr(block.experts, AFFINITY):
            parts[id(getattr(block.experts, AFFINITY))] = (PARTITION, 1.0)
    return {
        id(p): Member(name, *parts.get(id(p), (_group(name, p), 1.0)), p.numel(), p.dim())
        for name, p in model.named_parameters()
        if p.numel()
    }


def rate_unit(model: PreTrainedModel, blocks: list[MoEBlock], known: Members) -> float:
    """What learning rates of the model are in proportion to: the root mean square of the weights
    by which its experts read, over √hidden_size. (Those by which they write may hold gains.) Of a
    model without experts, that of its FFNs' weights."""
    read = [m for b in blocks for e in range(b.num_experts) for m in b.matrices(e)[:-1]]
    ffns = {id_ for id_, member in known.items() if member.group == "dense FFNs"}
    found = read or [p for p in model.parameters() if id(p) in ffns and p.dim() > 1]
    squares = sum(float(torch.linalg.vector_norm(matrix.detach())) ** 2 for matrix in found)
    hidden_size: int = model.config.get_text_config().hidden_size
    return math.sqrt(squares / sum(matrix.numel() for matrix in found) / hidden_size)


def _group(name: str, parameter: nn.Parameter) -> str:
    if "shared_expert" in name or "shared_mlp" in name:
        return "shared experts"
    if any(part in name for part in FFNS):
        return "dense FFNs"
    # A convolution has a few weights per channel, which nothing of low rank can change.
    if any(part in name for part in MIXERS) and parameter.dim() < 3:
        return "attention"
    return NORMS


def asked(member: Member, settings: Training) -> bool:
    """Whether it is to train: a part that would move after the last step alone is not."""
    return member.group in TRAINS[settings.train] and settings.start(member.part) < 1


def freeze_all_but(model: nn.Module, known: Members, settings: Training) -> None:
    """Let only what is asked for train.

    Raises:
        UpcycleError: the model has no such parameter.
    """
    for parameter in model.parameters():
        member = known.get(id(parameter))
        parameter.requires_grad_(member is not None and asked(member, settings))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UpcycleError(f"`train={settings.train}`: {_why_nothing(known, settings)}")


def _why_nothing(known: Members, settings: Training) -> str:
    """Why nothing of what was asked for trains."""
    groups = TRAINS[settings.train]
    if any(m.group in groups and settings.start(m.part) >= 1 for m in known.values()):
        return f"nothing begins to move before the last step: lower {setting('starts')}"
    return f"the model has no {' or '.join(groups)}"


def add_lora(model: nn.Module, known: Members, settings: Training) -> Any:
    """The model with low-rank changes (arXiv:2106.09685) of the asked groups' matrices, all else
    frozen; norms and embeddings get none.

    Stacked experts and routers are parameters of their modules and no `nn.Linear`: peft passes
    over them in silence unless they are named as `target_parameters`. So are FFNs' matrices, whose
    names peft would take for those that the experts' had before transformers 5.

    Raises:
        UpcycleError: peft is not installed, an asked group has no matrix, or peft left one out.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UpcycleError("`lora` needs `pip install upcycle[lora]`") from error
    matrices = [
        m
        for m in known.values()
        if asked(m, settings) and m.dimensions > 1 and not m.name.endswith(PAST_MODULES)
    ]
    attention = {m.name.removesuffix(".weight") for m in matrices if m.group == "attention"}
    parameters = {m.name for m in matrices if m.group in GROUPS[:3] + GROUPS[4:5]}
    if not attention | parameters:
        why = _why_nothing(known, settings)
        raise UpcycleError(f"`lora` with `train={settings.train}`: {why}")
    config = LoraConfig(
        r=settings.lora,
        lora_alpha=settings.alpha,
        target_modules=sorted(attention),
        target_parameters=sorted(parameters),
        task_type="CAUSAL_LM",
    )
    changed = get_peft_model(model, config)
    reached = {item.member.name for item in trained(changed, known)}
    for name in sorted({m.name for m in matrices if m.group != NORMS} - reached):
        raise UpcycleError(f"`lora`: this version of peft can't change {name}: upgrade it")
    return changed


def trained(model: nn.Module, known: Members) -> list[Trained]:
    """The parameters that train, each once."""
    found: dict[int, Trained] = {}
    for module in model.modules():
        if hasattr(module, "lora_A"):
            layer: Any = module
            changed = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
            member = known[id(changed)]
            for part, scale in ((layer.lora_A, 1.0), (layer.lora_B, member.scale)):
                found |= {id(p): Trained(p, member, scale) for p in part.parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in found:
            member = known[id(parameter)]
            found[id(parameter)] = Trained(parameter, member, member.scale)
    return list(found.values())


def summary(known: Members, training: list[Trained]) -> Groups:
    """What trains."""
    table = {group: {"parameters": 0, "trained": 0} for group in (*GROUPS, PARTITION)}
    for member in known.values():
        table[member.group]["parameters"] += member.size
    for item in training:
        table[item.member.group]["trained"] += item.parameter.numel()
    return {group: row for group, row in table.items() if row["parameters"]}
