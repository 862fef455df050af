"""Dense families: where a family keeps its FFN and what else its forward pass does.

Tensors are named as in llama once read; a family's `rewrite` brings them there. Every config
field is either carried over under the same name, turned into a trait that a target must accept,
known to have no effect on the forward pass, or an error: nothing is lost silently.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.core.errors import UpcycleError
from upcycle.core.registry import Registry
from upcycle.models.traits import Architecture, Trait

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


@dataclass(frozen=True)
class DenseFamily:
    """A dense architecture, by its `model_type`."""

    name: str
    always: Mapping[Trait, str] = field(default_factory=dict)
    """Traits that no config field switches, each with the words that explain it."""
    attention_bias: frozenset[Trait] = frozenset({Trait.QKV_BIAS, Trait.O_BIAS})
    """What `attention_bias: true` means here."""
    inert: Mapping[str, Any] = field(default_factory=dict)
    """Config fields of its own that do not change the forward pass at the given value; with
    ANY they never do."""
    extra: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}
    """Config fields in the common vocabulary that the source spells differently."""
    spelled: tuple[str, ...] = ()
    """Its own config fields that this reads."""
    width: Callable[[PreTrainedConfig], int] = lambda config: int(config.intermediate_size)
    """Neurons of its FFN."""
    partial_rotary: bool = False
    """Whether its class reads `partial_rotary_factor`; the others rotate whole heads whatever it
    says."""
    carried: tuple[str, ...] = ()
    """Config fields of its own that go to the target under the same name."""
    blocks: Blocks = Blocks()
    has_experts: Callable[[PreTrainedConfig], bool] = lambda config: False
    """Whether a model of its class, which has place for experts, is a Mixture-of-Experts."""
    bare_layers: Callable[[PreTrainedConfig], tuple[int, ...]] = lambda config: ()
    """Layers without an FFN."""
    ties: bool = True
    """Whether its class ties embeddings where config.json says so."""
    stored: Mapping[str, str] = field(default_factory=dict)
    """What names begin with in its checkpoints, with what transformers puts in its place."""
    rewrite: Rewrite = keep
    """One tensor of the source as tensors under llama's names."""


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
    """The architecture behind a dense config.

    Raises:
        UpcycleError: the family is not known, or a config field that changes the forward pass is
            not understood.
    """
    if config.model_type not in FAMILIES:
        raise UpcycleError(
            unsupported_reason(
                config.model_type, encoder_decoder=getattr(config, "is_encoder_decoder", False)
            )
        )
    family = FAMILIES[config.model_type]
    if family.has_experts(config):
        raise UpcycleError(already(config.model_type))
    _refuse_unknown_fields(config, family)
    fields = {name: getattr(config, name, None) for name in CARRIED}
    fields["head_dim"] = head_dim(config)
    fields["rope_parameters"] = dict(getattr(config, "rope_parameters", None) or {})
    fields["attention_multiplier"] = getattr(config, "attention_multiplier", None)
    fields |= {name: getattr(config, name, 1.0) for name in MULTIPLIERS}
    fields |= {
        "sliding_window": getattr(config, "sliding_window", None),
        "layer_types": layer_types(config),
    }
    fields |= {name: getattr(config, name) for name in family.carried}
    fields |= family.extra(config)
    return Architecture(
        family=family.name,
        fields=fields,
        traits=dict(family.always) | _traits(config, family, fields),
        intermediate_size=family.width(config),
        bare_layers=family.bare_layers(config),
    )


def head_dim(config: PreTrainedConfig) -> int:
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def layer_types(config: PreTrainedConfig) -> list[str]:
    """`full_attention` or `sliding_attention` for each layer."""
    declared = getattr(config, "layer_types", None)
    if declared:
        return list(declared)
    window = getattr(config, "sliding_window", None)
    kind = "sliding_attention" if window else "full_attention"
    return [kind] * config.num_hidden_layers


def _traits(
    config: PreTrainedConfig, family: DenseFamily, fields: Mapping[str, Any]
) -> dict[Trait, str]:
    traits: dict[Trait, str] = {}
    if getattr(config, "attention_bias", False):
        traits |= dict.fromkeys(family.attention_bias, "attention_bias=true")
    if Trait.UNGATED in family.always and fields["hidden_act"] != "relu2":
        traits[Trait.UNSQUARED] = f"hidden_act={fields['hidden_act']}"
    if getattr(config, "mlp_bias", False):
        traits[Trait.MLP_BIAS] = "mlp_bias=true"
    kinds = set(fields["layer_types"])
    if "sliding_attention" in kinds:
        trait = Trait.SLIDING_WINDOW if len(kinds) == 1 else Trait.MIXED_WINDOW
        traits[trait] = f"sliding_window={fields['sliding_window']}"
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
    if getattr(config, "quantization_config", None):
        raise UpcycleError(
            "config.json has a quantization_config, and quantised weights can't be split or "
            "copied: start from the unquantised checkpoint"
        )
    defaults = type(config)()
    read = {*UNDERSTOOD, *CARRIED, *family.carried, *family.spelled}
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


REASONS = {
    "gemma2": "caps its attention logits, which no native MoE does",
    "gemma3": "is multimodal, and its text model has sandwich norms that no native MoE has",
    "gemma3_text": "has sandwich norms with two rotary bases, which no native MoE has",
    "gpt2": "has an ungated FFN with biases and learned positions, which no native MoE has",
    "gpt_neox": "has an ungated FFN with biases, which no native MoE decoder has",
    "opt": "has an ungated FFN with biases and learned positions, which no native MoE has",
    "phi": "has an ungated FFN with biases in a parallel block, which no native MoE has",
    "falcon": "has an ungated FFN, which no native MoE with its attention has",
    "starcoder2": "has an ungated FFN with biases, which no native MoE has",
    "bert": "is an encoder, and no native MoE encoder hosts it",
}

MOE_BY_ANOTHER_NAME = set(
    "mixtral dbrx flex_olmo gpt_oss deepseek_v2 deepseek_v3 jamba qwen3_next llama4_text".split()
)


def is_dense(config: PreTrainedConfig) -> bool:
    """Whether a model is one of a dense family."""
    name = config.model_type
    return name in FAMILIES and not FAMILIES[name].has_experts(config)


def already(model_type: str) -> str:
    """Why a Mixture-of-Experts is not converted, as a sentence."""
    return f"the source is a {model_type} model, which is a Mixture-of-Experts already"


def unsupported_reason(model_type: str, *, encoder_decoder: bool = False) -> str:
    """Why a model is not converted, as a sentence."""
    known = ", ".join(sorted(FAMILIES))
    if encoder_decoder:
        return (
            f"{model_type} is an encoder-decoder, and upcycle converts decoders alone "
            f"(supported: {known})"
        )
    if model_type in REASONS:
        return (
            f"{model_type} can't become a native MoE: it {REASONS[model_type]} (supported: {known})"
        )
    if "moe" in model_type or model_type in MOE_BY_ANOTHER_NAME:
        return already(model_type)
    return (
        f"model_type {model_type!r} is not a dense family that upcycle knows (supported: {known})"
    )
