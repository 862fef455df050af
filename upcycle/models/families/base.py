"""Dense families: where a family keeps its FFN and what else its forward pass does.

Tensors are named as in llama once read; a family's `rewrite` brings them there. Every config
field is either carried over under the same name, turned into a trait that a target must accept,
known to have no effect on the forward pass, or an error: nothing is lost silently.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
)

from upcycle.core.errors import UpcycleError
from upcycle.core.registry import Registry
from upcycle.models.holders import HOLDERS
from upcycle.models.traits import Architecture, Trait
from upcycle.models.unhosted import MOE_BY_ANOTHER_NAME, REASONS

Rewrite = Callable[[str, Tensor, PreTrainedConfig], Mapping[str, Tensor]]


def keep(name: str, tensor: Tensor, config: PreTrainedConfig) -> Mapping[str, Tensor]:
    return {name: tensor}


@dataclass(frozen=True)
class Blocks:
    """Where a family's modules keep what the calibration tokens pass through."""

    embeddings: tuple[str, ...] = ("embed_tokens",)
    """Modules of the decoder that make its first hidden states of tokens."""
    norm: str = "norm"
    """The decoder's last one."""
    mixers: tuple[str, ...] = ("self_attn",)
    """Modules of a layer that mix tokens, of which each layer has one."""
    ffn: str = "mlp"
    after: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of a layer with the values by which nothing is done to what it is when its FFN's
    output has been added."""
    handed_on: tuple[str, ...] = ()
    """What a layer puts out beside hidden states, by the names by which the next one takes it."""


@dataclass(frozen=True)
class Stack:
    """Layers that follow one another."""

    module: str = "model"
    """What holds them, and embeddings and a norm around them."""
    layers: str = "layers"
    """Their name there."""
    count: str = "num_hidden_layers"
    """The config field that says how many there are."""
    ffn: str = ""
    """What the name of an FFN in a layer begins with, in the dense model as in its host."""


@dataclass(frozen=True)
class Drafts:
    """Layers like the others, and what is around them, that draft further tokens. transformers
    passes over them."""

    place: str
    """What their tensors' names begin with; those of the layers go on with `layers.N.`."""
    count: str
    """The config field that says how many there are."""


@dataclass(frozen=True)
class DenseFamily:
    """A dense architecture, by the `model_type` of its text model."""

    name: str
    always: Mapping[Trait, str] = field(default_factory=dict)
    """Traits that no config field switches, each with the words that explain it."""
    attention_bias: frozenset[Trait] = frozenset({Trait.QKV_BIAS, Trait.O_BIAS})
    """What `attention_bias: true` means here."""
    inert: Mapping[str, Any] = field(default_factory=dict)
    """Config fields of its own that do not change the forward pass at the given value; with
    ANY they never do."""
    understood: frozenset[str] = frozenset()
    """Config fields of its own that the functions here read."""
    extra: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}
    """Config fields in the common vocabulary that the source spells differently."""
    traits: Callable[[PreTrainedConfig], dict[Trait, str]] = lambda config: {}
    """Traits that config fields of its own switch, each with the field and value that does."""
    width: Callable[[PreTrainedConfig], int] = lambda config: int(config.intermediate_size)
    """Neurons of its FFN."""
    partial_rotary: bool = False
    """Whether its class reads `partial_rotary_factor`; the others rotate whole heads whatever it
    says."""
    carried: tuple[str, ...] = ()
    """Config fields of its own that go to the target under the same name."""
    routed: Callable[[PreTrainedConfig], bool] = lambda config: False
    """Whether a config of this model_type is an MoE's."""
    drafts: Drafts | None = None
    blocks: Blocks = Blocks()
    stacks: tuple[Stack, ...] = (Stack(),)
    """Where its layers are; of an encoder-decoder, the encoder's before the decoder's."""
    bare_layers: Callable[[PreTrainedConfig], tuple[int, ...]] = lambda config: ()
    """Layers without an FFN."""
    ties: bool = True
    """Whether its class ties embeddings where config.json says so."""
    stored: Mapping[str, str] = field(default_factory=dict)
    """What names begin with in its checkpoints, with what transformers puts in its place."""
    unread: re.Pattern[str] = re.compile("(?!)")
    """Names of tensors that some of its checkpoints hold, but its class passes over, as nothing was
    ever done with them."""
    rewrite: Rewrite = keep
    """One tensor of the source as tensors under llama's names."""
    auto: Any = AutoModelForCausalLM
    """transformers' name for its class with a head that makes logits."""


ANY = object()
FAMILIES: Registry[DenseFamily] = Registry("dense family")

# Carried over under the same name; every target has all of them.
CARRIED = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache "
    "tie_word_embeddings rope_parameters attention_dropout bos_token_id eos_token_id pad_token_id"
).split()
MULTIPLIERS = {
    "embedding_multiplier": Trait.EMBEDDING_MULTIPLIER,
    "residual_multiplier": Trait.RESIDUAL_MULTIPLIER,
    "logits_scaling": Trait.LOGITS_SCALING,
}
# Read into traits below.
UNDERSTOOD = {
    "intermediate_size",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "attention_multiplier",
    *MULTIPLIERS,
}


def describe(config: PreTrainedConfig) -> Architecture:
    """The architecture behind a dense config; of a model of several parts, that of its text model.

    Raises:
        UpcycleError: the family is not known, or a config field that changes the forward pass is
            not understood.
    """
    whole, config = config, config.get_text_config()
    if config.model_type not in FAMILIES:
        named = whole if whole.model_type in REASONS else config
        raise UpcycleError(
            unsupported_reason(
                named.model_type,
                encoder_decoder=getattr(whole, "is_encoder_decoder", False),
                gated=getattr(whole, "is_gated_act", False),
            )
        )
    family = FAMILIES[config.model_type]
    if family.routed(config):
        raise UpcycleError(_routed_already(config.model_type))
    _refuse_unknown_fields(config, family)
    alike = _alike(config)
    fields = {name: getattr(alike, name, None) for name in CARRIED}
    fields["head_dim"] = head_dim(alike)
    fields["rope_parameters"] = rope = dict(getattr(config, "rope_parameters", None) or {})
    fields["attention_multiplier"] = getattr(config, "attention_multiplier", None)
    fields |= {name: getattr(config, name, 1.0) for name in MULTIPLIERS}
    fields |= {
        "sliding_window": getattr(config, "sliding_window", None),
        "layer_types": layer_types(config),
        "layer_rope_theta": [rope.get("rope_theta")] * config.num_hidden_layers,
    }
    fields |= {name: getattr(config, name) for name in family.carried}
    fields |= family.extra(config)
    return Architecture(
        family=family.name,
        fields=fields,
        traits=dict(family.always) | family.traits(config) | _traits(config, family, fields),
        intermediate_size=family.width(config),
        bare_layers=family.bare_layers(config),
        whole="" if whole is config else whole.model_type,
        encoder_layers=sum(getattr(config, stack.count) for stack in family.stacks[:-1]),
    )


def _alike(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config without what it says of single layers, with which transformers lets nobody read
    what holds of the others."""
    alike = copy(config)
    alike.per_layer_config = None
    return alike


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether tokens of a model, dense or not, see those after them too."""
    config = config.get_text_config()
    kind = config.model_type
    always = kind in FAMILIES and Trait.BIDIRECTIONAL in FAMILIES[kind].always
    return always or not getattr(config, "is_causal", True)


def auto_class(config: PreTrainedConfig) -> Any:
    """transformers' name for the class of a model, dense or not, with its head."""
    if config.model_type in HOLDERS and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    kind = config.model_type
    if kind in FAMILIES:
        return FAMILIES[kind].auto
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def head_dim(config: PreTrainedConfig) -> int:
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def layer_types(config: PreTrainedConfig) -> list[str]:
    """`full_attention` or `sliding_attention` for each layer."""
    # A class that does not declare the field does not read it, whatever config.json says.
    declared = "layer_types" in type(config).__annotations__ and config.layer_types
    if declared:
        return list(declared)
    window = getattr(config, "sliding_window", None)
    kind = "sliding_attention" if window else "full_attention"
    return [kind] * config.num_hidden_layers


def _traits(
    config: PreTrainedConfig, family: DenseFamily, fields: Mapping[str, Any]
) -> dict[Trait, str]:
    traits: dict[Trait, str] = {}
    if not getattr(config, "is_causal", True):
        traits[Trait.BIDIRECTIONAL] = "is_causal=false"
    if getattr(config, "attention_bias", False):
        traits |= dict.fromkeys(family.attention_bias, "attention_bias=true")
    if Trait.UNGATED in family.always and fields["hidden_act"] != "relu2":
        traits[Trait.UNSQUARED] = f"hidden_act={fields['hidden_act']}"
    if getattr(config, "mlp_bias", False):
        traits[Trait.MLP_BIAS] = "mlp_bias=true"
    kinds = set(fields["layer_types"])
    if "sliding_attention" in kinds:
        if not fields["sliding_window"]:
            raise UpcycleError(
                "config.json has sliding_attention in layer_types but no sliding_window, so what "
                "those layers see is not clear: set the one or change the other"
            )
        trait = Trait.SLIDING_WINDOW if len(kinds) == 1 else Trait.MIXED_WINDOW
        traits[trait] = f"sliding_window={fields['sliding_window']}"
    thetas = fields["layer_rope_theta"]
    if 0 in thetas:
        traits[Trait.LAYERS_WITHOUT_ROTARY] = f"{thetas.count(0)} of {len(thetas)}"
    if len(set(thetas) - {0}) > 1:
        traits[Trait.LAYER_ROTARY] = f"layer_rope_theta={thetas}"
    rotary = fields["rope_parameters"].get("partial_rotary_factor", 1.0)
    if rotary != 1.0 and not family.partial_rotary:
        raise UpcycleError(
            f"config.json sets partial_rotary_factor={rotary}, which transformers' {family.name} "
            "ignores, so what the model computes is not clear: remove it"
        )
    if rotary != 1.0:
        traits[Trait.PARTIAL_ROTARY] = f"partial_rotary_factor={rotary}"
    scale = fields["attention_multiplier"]
    if scale is not None and not math.isclose(scale, fields["head_dim"] ** -0.5, rel_tol=1e-6):
        traits[Trait.ATTENTION_MULTIPLIER] = f"attention_multiplier={scale}"
    for name, trait in MULTIPLIERS.items():
        if fields[name] != 1.0:
            traits[trait] = f"{name}={fields[name]:g}"
    return traits


def _refuse_unknown_fields(config: PreTrainedConfig, family: DenseFamily) -> None:
    defaults = type(config)()
    read = {*UNDERSTOOD, *CARRIED, *family.carried, *family.understood}
    for name in type(config).__annotations__:
        if name in read:
            continue
        value, default = getattr(config, name, None), getattr(defaults, name, None)
        if name in family.inert:
            default = value if family.inert[name] is ANY else family.inert[name]
        if name not in PreTrainedConfig.__annotations__ and value != default:
            raise UpcycleError(
                f"config.json sets {name}={value!r}, which changes the forward pass of "
                f"{family.name} and has no home in any target (supported: {default!r})"
            )


def unsupported_reason(
    model_type: str, *, encoder_decoder: bool = False, gated: bool = False
) -> str:
    """Why a model is not converted, as a sentence.

    Args:
        gated: whether the FFN of an encoder-decoder has a gate.
    """
    known = f"(supported: {', '.join(sorted(FAMILIES))})"
    if model_type in REASONS:
        return f"{model_type} can't become a native MoE: it {REASONS[model_type]} {known}"
    if "moe" in model_type or model_type in MOE_BY_ANOTHER_NAME:
        return _routed_already(model_type)
    if encoder_decoder and gated:
        return (
            f"{model_type} with gated FFNs can't become a native MoE: it is an encoder-decoder, "
            f"and no native MoE of these has gated experts {known}"
        )
    if encoder_decoder:
        return f"{model_type} is an encoder-decoder of a family that upcycle does not know {known}"
    nearest = difflib.get_close_matches(model_type, FAMILIES, n=1)
    hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
    return f"model_type {model_type!r} is not a dense family that upcycle knows{hint} {known}"


def _routed_already(model_type: str) -> str:
    return f"the source is a {model_type} model, which is a Mixture-of-Experts already"
