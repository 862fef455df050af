"""Targets: what a native MoE architecture accepts, its config, its tensor names, its gains.

A dense FFN is a sum over neurons; native routers take a weighted mean over experts. Two ways to
combine bridge that:

- `sum` (splits): every selected expert counts about 1. The router's logits spread by τ, so that
  its weights are equal to O(τ), and the missing gain is folded into down_proj or a config field;
  what a refit fits are the weights as they are. Where no runtime renormalises unless told to, the
  gain is E whatever top_k is, so top_k may be changed later.
- `mean` (copies): weights add up to 1, and a mean of equal experts is the expert itself, whatever
  the router's logits are.
- `plain` (copies whose weights are left as the score makes them): the dense FFN on average, if all
  scores were the same.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from upcycle.core.registry import Registry
from upcycle.core.types import DenseFFN, Geometry, MoELayer
from upcycle.models.holders import HOLDERS
from upcycle.models.runtimes import Run, Runtime
from upcycle.models.traits import Architecture, Trait

Named = Iterator[tuple[str, Tensor]]
Combine = Literal["sum", "mean", "plain"]
LEVELS = 8
"""Of scores that are rounded, how many the spread of a router's logits must span."""
SharedWidth = Literal["any", "multiple", "none"]
"""Which widths a shared expert may have: any, multiples of a routed expert's, or only zero."""


@dataclass(frozen=True, slots=True)
class Gains:
    """What turns a target's weighted mean into the combination that is wanted."""

    routed: float
    """Folded into every routed expert: into its down_proj, unless it is spread."""
    shared: float
    """Folded into down_proj of the shared expert."""
    norm_topk_prob: bool
    scale: float
    """`routed_scaling_factor`, or what is stored in its place, where the target has one for it."""
    all_on: float
    """Further factor on the routed experts once top_k is set to E (for the check)."""
    spread: bool = False
    """Whether each of an expert's three matrices takes the cube root of the gain."""

    def over_three_matrices(self) -> "Gains":
        """The same gain, spread, with nothing left to a config field."""
        return replace(self, routed=self.routed * self.scale, scale=1.0, spread=True)


@dataclass(frozen=True, slots=True)
class Routing:
    """How the target's router weights the experts that it selects."""

    score: Literal["softmax", "sigmoid"]
    renormalises: Literal["always", "usually", "optional", "never"]
    """Whether the weights of the selected experts are divided by their sum. `usually`: the config
    decides it in transformers, but llama.cpp always does."""
    shared_gate: float | None = 1.0
    """Weight of the shared expert when its gate is near zero; None where there is none."""
    scales: bool = False
    """Whether weights are multiplied by a number that is stored, which then is the gain: a factor
    in the config, or a tensor."""
    in_model_dtype: bool = False
    """Whether scores are rounded to the model's dtype before experts are selected."""

    def least_spread(self, dtype: torch.dtype) -> float:
        """The least spread of logits of which scores in this dtype show enough."""
        if not self.in_model_dtype:
            return 0.0
        # Sigmoid scores near a half are eps / 2 apart, and change a quarter as fast as logits; a
        # softmax's are eps of themselves apart, and change by as much of themselves as logits do.
        steps = 2 * LEVELS if self.score == "sigmoid" else LEVELS
        return steps * torch.finfo(dtype).eps

    def weights(self, logits_TE: Tensor, top_k: int, gains: Gains) -> Tensor:
        """What each expert counts for a token in the end, [T, E], its gains included: nothing where
        it is not selected."""
        logits_TE = logits_TE.float()
        scores_TE = logits_TE.sigmoid() if self.score == "sigmoid" else logits_TE.softmax(-1)
        chosen_TK = logits_TE.topk(top_k, dim=-1).indices
        weights_TK = scores_TE.gather(-1, chosen_TK)
        if gains.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        weights_TK = weights_TK * (gains.routed * gains.scale)
        return torch.zeros_like(scores_TE).scatter_(-1, chosen_TK, weights_TK)


@dataclass(frozen=True, slots=True)
class MoESpec:
    """All that a target's config depends on besides the architecture."""

    geometry: Geometry
    gains: Gains
    dense_layers: tuple[int, ...]


Limit = Callable[[Architecture, MoESpec], str]
"""What a runtime can't do, if this model is beyond it; else nothing."""


@dataclass(frozen=True)
class Whole:
    """The class that has a text model of a target's beside other parts, and those as the dense
    models' class has them."""

    model_type: str
    architecture: str
    parts: Mapping[str, str] = field(default_factory=dict)
    """The model_types of other parts, by the config fields that describe them, where they differ
    from the dense models'."""


@dataclass(frozen=True)
class MoETarget:
    """A native MoE architecture."""

    name: str
    routing: Routing
    dense_layers: Literal["any", "ends", "prefix", "none"]
    """Which layers can stay dense. `ends`: the first and the last ones, so that the others follow
    one another, or all but every n-th between them (see `moe_range`)."""
    split_rank: int
    """Place in the order in which `--target auto` tries targets for a split."""
    copy_rank: int
    config: Callable[[Architecture, MoESpec], dict[str, Any]]
    """Config fields beside `common_fields`."""
    experts: Callable[[MoELayer, Gains], Named]
    """Names below `model.layers.N.` and tensors of a converted FFN, in the target's hub layout."""
    runtimes: Mapping[Runtime, tuple[Limit, ...]]
    """What may keep each other runtime from loading this, or from computing what transformers
    does."""
    ran: Mapping[Runtime, Run] = field(default_factory=dict)
    """Where results in this target were run; of the other runtimes only the sources were read."""
    accepts: frozenset[Trait] = frozenset()
    requires: frozenset[Trait] = frozenset()
    made_for: frozenset[Trait] = frozenset()
    """Traits of which the source must have one, where what has none does better elsewhere."""
    extra: Callable[[Architecture, Mapping[str, Tensor]], Named] = lambda arch, layer: iter(())
    """Tensors of a layer that the source does not have, or has with other values, given those that
    it has."""
    spelled: Mapping[str, str] = field(default_factory=dict)
    """Its own names for tensors that are not converted, by llama's: of a dense layer's FFN, below
    `model.layers.N.`, and of what belongs to no layer."""
    model_type: str = ""
    """Of its config.json, where that is not its name."""
    whole: Whole | None = None
    root: str = "model."
    """What names begin with in its hub layout, outside the head."""
    older: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    """Fields of a config.json as transformers 4 and other runtimes spell them, where they are to
    stand in place of transformers 5's spelling, which reads both."""
    outer: Callable[[Architecture, Mapping[str, Tensor]], Named] = lambda arch, outer: iter(())
    """The same of the tensors that belong to no layer."""
    fields: tuple[str, ...] | None = None
    """The fields of a dense config that it has place for, where that is not all of them."""
    limit: Callable[[Architecture], str] = lambda arch: ""
    """What of the traits that it accepts it has no place for, as the end of a sentence."""
    min_experts: int = 1
    most_top_k: int | None = None
    """Experts of a token at most, where the class has such a limit."""
    groups: bool = False
    """Whether a token gets copies whole where two score the same: because it can be held to the
    best groups of experts (`n_group`, `topk_group`), or in another way."""
    shared_in_experts: bool = False
    """Whether the shared expert's width is given as a number of routed experts'."""
    lora: tuple[str, ...] = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    """Names of the experts' parameters below a layer of the loaded model, where they are stacked
    whatever the hub layout."""
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names there of attention's linear layers."""
    router: str = "mlp.gate.weight"
    """The router's name there."""
    linear_router: str | None = None
    """The name there of a module around the router, where that is a linear layer like others."""
    shared_gate: str | None = None
    """The name there of the linear layer whose one row weighs the shared expert."""

    @property
    def gated(self) -> bool:
        """Whether its FFNs have gates; up stands for one where the source has none."""
        return Trait.UNGATED not in self.requires

    def doubles(self, arch: Architecture) -> bool:
        """Whether an FFN's first matrix is stored twice."""
        return self.gated and Trait.UNGATED in arch.traits

    @property
    def shared_width(self) -> SharedWidth:
        if self.routing.shared_gate is None:
            return "none"
        return "multiple" if self.shared_in_experts else "any"

    def gains(self, combine: Combine, geometry: Geometry) -> Gains:
        """The gains for this combination; see the module's docstring."""
        renormalises, num_experts = self.routing.renormalises, geometry.num_experts
        top_k = geometry.top_k
        if combine == "mean":
            # Each selected shard weighs 1 / G of what a whole copy does.
            return self._gains(float(geometry.granularity), norm_topk_prob=True)
        # Of how many shards a copy has, how many a token gets.
        share = geometry.granularity / top_k if combine == "plain" else 1
        # Of one weight there is nothing to renormalise, and a router that should learn needs it.
        one_of_each = renormalises == "usually" and top_k == 1
        if combine == "plain" or renormalises in ("optional", "never") or one_of_each:
            whole = 2.0 if self.routing.score == "sigmoid" else num_experts
            return self._gains(whole * share, norm_topk_prob=False)
        return self._gains(top_k, norm_topk_prob=True, all_on=num_experts / top_k)

    def _gains(self, gain: float, *, norm_topk_prob: bool, all_on: float = 1.0) -> Gains:
        """This gain where the target has a place for it, else in the experts."""
        routed, scale = (1.0, gain) if self.routing.scales else (gain, 1.0)
        shared = 1 / (self.routing.shared_gate or 1.0)
        return Gains(routed, shared, norm_topk_prob=norm_topk_prob, scale=scale, all_on=all_on)

    def misfit(self, arch: Architecture) -> str:
        """What of the model it has no place for, or asks for, as the end of a sentence."""
        held = arch.whole in HOLDERS and self.root == "model."
        if arch.whole and self.whole is None and not held:
            return f"{self.name} has no place for the other parts of a {arch.whole} model"
        for trait in sorted(set(arch.traits) - self.accepts - self.requires - EVERYWHERE):
            return (
                f"the source has {trait} ({arch.traits[trait]}), which {self.name} has no place for"
            )
        for trait in sorted(self.requires - set(arch.traits)):
            return f"{self.name} always has {trait}, which the source has not"
        return ""

    def refusal(
        self,
        arch: Architecture,
        *,
        dense_layers: tuple[int, ...] = (),
        shared: float | None = None,
        gated: bool = False,
        experts: int | None = None,
        top_k: int | None = None,
    ) -> str:
        """Why this target can't host the model, as the end of a sentence; empty if it can.

        Args:
            shared: the share of the neurons that is asked to be always on.
            gated: whether that is to have a gate with a row of its own.
            experts: as many as are asked for.
            top_k: the same of experts per token.
        """
        if misfit := self.misfit(arch):
            return misfit
        if self.made_for and not self.made_for & set(arch.traits):
            return (
                f"{self.name} is only for models with {' or '.join(sorted(self.made_for))}, "
                "as others run faster on other targets"
            )
        if own := self.limit(arch):
            return own
        if top_k and self.most_top_k and top_k > self.most_top_k:
            most = self.most_top_k
            return f"{self.name} gives a token at most {most} of its experts (`top_k={top_k}`)"
        if shared and self.shared_width == "none":
            asked = f" (`shared={shared:g}`)" if shared < 1 else ""
            return f"{self.name} has no shared expert{asked}"
        if gated and self.shared_gate is None:
            return f"{self.name} has no gate for its shared expert, which has prompts"
        if dense_layers and self.dense_layers == "none":
            return f"{self.name} can't keep layers dense (`keep_dense`)"
        if self.dense_layers == "prefix" and dense_layers != tuple(range(len(dense_layers))):
            return f"{self.name} can keep only the first layers dense (`keep_dense=0,1,…`)"
        if self.dense_layers == "ends" and moe_range(dense_layers, arch.num_layers) is None:
            return (
                f"{self.name} can keep only the first and the last layers dense (`keep_dense=0,…`)"
            )
        if experts is not None and experts < self.min_experts:
            return f"{self.name} needs at least {self.min_experts} experts"
        return ""


TARGETS: Registry[MoETarget] = Registry("target")
EVERYWHERE = frozenset({Trait.BIDIRECTIONAL})
"""What transformers does in any class that a config field asks for it."""


def unplaced(arch: Architecture) -> list[str]:
    """What the source has that no target has a place for, with what asks for it."""
    placed = frozenset[Trait]().union(*(t.accepts | t.requires for t in TARGETS.values()))
    return [f"{trait} ({arch.traits[trait]})" for trait in sorted(set(arch.traits) - placed)]


def moe_range(dense_layers: tuple[int, ...], layers: int) -> range | None:
    """The other layers as from one to another in equal steps, each n-th if the step is n; None if
    they are not."""
    routed = [layer for layer in range(layers) if layer not in dense_layers]
    first, last = routed[0], routed[-1]
    steps = (step for step in range(1, layers + 1) if (first + 1) % step == 0)
    ranges = (range(first, last + 1, step) for step in steps)
    return next((each for each in ranges if list(each) == routed), None)


def common_fields(arch: Architecture, target: MoETarget, dtype: torch.dtype) -> dict[str, Any]:
    """The config fields that every target spells as the source does."""
    carried = {k: v for k, v in arch.fields.items() if k not in _PLACED_BY_TARGETS}
    if target.fields is not None:
        carried = {k: carried[k] for k in target.fields if k in carried}
    if not carried.get("rope_parameters", True):
        del carried["rope_parameters"]
    if target.doubles(arch):
        carried["hidden_act"] = "relu"  # times what it was of, relu²
    of_encoder = {"is_causal": False, "use_cache": False} if arch.encoder else {}
    return carried | {
        "model_type": target.model_type or target.name,
        "dtype": str(dtype).removeprefix("torch."),
        "output_router_logits": False,
        **of_encoder,
    }


def older_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as transformers 4 spells them, which other runtimes go on to read.

    transformers 5 takes both, but writes its own only: what rotary embeddings need is all in
    `rope_parameters`, where others do not look and silently take a default; and some fields have
    new names.
    """
    rope = config.get("rope_parameters", {})
    if "rope_theta" not in rope:
        return dict(config)  # none, or by the kinds of layers, which has no older spelling
    kind = rope.get("rope_type", "default")
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    older = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if kind == "default" else scaling,
    }
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        older["original_max_position_embeddings"] = original
        if rope.get("factor") is not None and rope.get("attention_factor") is None:
            # transformers 4 takes the factor from max_position_embeddings, whatever is said here.
            factor = max(1.0, rope["factor"])
            scaling["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(original))
    return dict(config) | older


_PLACED_BY_TARGETS = {
    "sliding_window",
    "layer_types",
    "layer_rope_theta",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
}


def attention_bias(arch: Architecture) -> bool:
    return Trait.QKV_BIAS in arch.traits


def missing_biases(layer: Mapping[str, Tensor], *projections: str) -> Named:
    """Biases of zeros for those of a layer's attention that have none."""
    for name in (f"self_attn.{projection}" for projection in projections):
        if f"{name}.bias" not in layer:
            yield f"{name}.bias", torch.zeros_like(layer[f"{name}.weight"][:, 0])


def copy_groups(geometry: Geometry) -> dict[str, int]:
    """For classes that hold a token to the best groups of experts: a group per copy, and as many of
    them for a token as hold its experts."""
    if geometry.granularity == 1:
        return {"n_group": 1, "topk_group": 1}
    return {
        "n_group": geometry.copies,
        "topk_group": math.ceil(geometry.top_k / geometry.granularity),
    }


def with_gain(ffn: DenseFFN, gain: float) -> DenseFFN:
    """The FFN with its output multiplied; without rounding if the gain is a power of two."""
    return replace(ffn, down_DF=_times(ffn.down_DF, gain))


def with_routed_gain(ffn: DenseFFN, gains: Gains) -> DenseFFN:
    """A routed expert with its gain. Spread over three matrices it is another function, as the
    gate's activation is not linear (arXiv:2410.07524 does so all the same)."""
    if not gains.spread:
        return with_gain(ffn, gains.routed)
    root = gains.routed ** (1 / 3)
    return ffn.changed(lambda matrix: _times(matrix, root))


def _times(matrix: Tensor, gain: float) -> Tensor:
    return matrix if gain == 1.0 else (matrix.float() * gain).to(matrix.dtype)


def shared_or_silent(layer: MoELayer, neurons: int) -> DenseFFN:
    """The shared expert; for a class that always has one, else one of so many neurons that put out
    nothing."""
    if layer.shared is not None:
        return layer.shared
    rows_SD = layer.router_ED.new_zeros(neurons, layer.router_ED.shape[1])
    return DenseFFN(rows_SD, rows_SD, rows_SD.T, act=lambda x: x)


def separate(prefix: str, ffn: DenseFFN, names: tuple[str, str, str]) -> Named:
    """The three matrices of one FFN under `prefix` + (gate, up, down). Where it has no gate, up
    stands for it: with relu in place of relu², that is the same."""
    for name, tensor in zip(names, (ffn.rows_FD, ffn.up_FD, ffn.down_DF), strict=True):
        yield f"{prefix}{name}.weight", tensor


LLAMA_NAMES = ("gate_proj", "up_proj", "down_proj")


def fused(layer: MoELayer, gains: Gains, prefix: str) -> Named:
    """Two tensors for all experts, [E, 2F, D] of gates and ups and [E, D, F]."""
    ffns = [with_routed_gain(layer.expert(e), gains) for e in range(layer.num_experts)]
    yield f"{prefix}gate_up_proj", torch.stack([torch.cat([f.rows_FD, f.up_FD]) for f in ffns])
    yield f"{prefix}down_proj", torch.stack([f.down_DF for f in ffns])


def per_expert(
    layer: MoELayer,
    gains: Gains,
    *,
    router: str,
    prefix: str,
    names: tuple[str, str, str] = LLAMA_NAMES,
) -> Named:
    """The router and one set of three matrices per expert: the layout of most hubs' files."""
    yield router, layer.router_ED
    for e in range(layer.num_experts):
        yield from separate(f"{prefix}{e}.", with_routed_gain(layer.expert(e), gains), names)
