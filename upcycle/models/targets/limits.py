"""What another runtime's own code for an architecture can't do: one function, one limit.

Each says what stands between the runtime and a model, as a part of a sentence; nothing if nothing
does. Its docstring is the limit in general, for docs/runtimes.md. Compared with transformers 5 at
llama.cpp b11549, vLLM 0.32, mlx-lm 0.32 and transformers 4.57.6 (dev/log.md).
"""

from upcycle.models.holders import HOLDERS
from upcycle.models.targets.base import MoESpec
from upcycle.models.traits import Architecture, Trait


def unknown(arch: Architecture, spec: MoESpec) -> str:
    """The architecture is not known."""
    return "it does not know the architecture"


def text_alone(arch: Architecture, spec: MoESpec) -> str:
    """The text model is known with the other parts only."""
    return "" if arch.whole else "it knows only the model of several parts, not the text model"


def looks_back(arch: Architecture, spec: MoESpec) -> str:
    """Tokens see those before them."""
    return "tokens see only those before them" if arch.encoder else ""


def no_moe_inside(arch: Architecture, spec: MoESpec) -> str:
    """The text model of a model of several parts is dense, or of the family's own MoE."""
    held = arch.whole in HOLDERS
    return f"the text model of a {arch.whole} can't be an MoE" if held else ""


def silu_only(arch: Architecture, spec: MoESpec) -> str:
    """Experts compute silu."""
    act = arch.fields["hidden_act"]
    return "" if act in ("silu", "swish") else f"experts compute silu, not {act}"


def gelu_only(arch: Architecture, spec: MoESpec) -> str:
    """Experts compute gelu_pytorch_tanh."""
    act = arch.fields["hidden_act"]
    return "" if act == "gelu_pytorch_tanh" else f"experts compute gelu_pytorch_tanh, not {act}"


def all_layers_routed(arch: Architecture, spec: MoESpec) -> str:
    """Every layer has experts."""
    return "every layer must have experts (`keep_dense=none`)" if spec.dense_layers else ""


def first_dense_only(arch: Architecture, spec: MoESpec) -> str:
    """Of the layers, only the first can be dense."""
    first = spec.dense_layers == tuple(range(len(spec.dense_layers)))
    return "" if first else "only the first layers can be dense (`keep_dense=0,1,…`)"


def shared_needed(arch: Architecture, spec: MoESpec) -> str:
    """There is a shared expert."""
    return "" if spec.geometry.shared_size else "there must be a shared expert"


def never_renormalises(arch: Architecture, spec: MoESpec) -> str:
    """Weights of experts are not divided by their sum."""
    return "weights of experts are not renormalised" if spec.gains.norm_topk_prob else ""


def always_renormalises(arch: Architecture, spec: MoESpec) -> str:
    """Weights of experts are divided by their sum."""
    return "" if spec.gains.norm_topk_prob else "weights of experts are renormalised"


def untied(arch: Architecture, spec: MoESpec) -> str:
    """Output embeddings are tensors of their own."""
    return "output embeddings must be tensors of their own" if arch.tied else ""


def heads_fill_hidden(arch: Architecture, spec: MoESpec) -> str:
    """The size of a head is worked out: together heads are as wide as the hidden states."""
    hidden, heads, size = arch.hidden_size, arch.fields["num_attention_heads"], arch.head_dim
    fills = size * heads == hidden
    return "" if fills else f"heads must be of {hidden} / {heads} channels, not {size}"


def no_biases(arch: Architecture, spec: MoESpec) -> str:
    """Attention has no biases."""
    biased = {Trait.QKV_BIAS, Trait.O_BIAS} & set(arch.traits)
    return "attention has no biases" if biased else ""


def no_output_bias(arch: Architecture, spec: MoESpec) -> str:
    """Attention has no bias on its output."""
    return "attention has no bias on its output" if Trait.O_BIAS in arch.traits else ""


def no_window(arch: Architecture, spec: MoESpec) -> str:
    """Attention has no sliding window."""
    window = arch.sliding_window
    return f"attention sees further than {window:,} tokens" if window else ""


def window_needed(arch: Architecture, spec: MoESpec) -> str:
    """Some layer has a sliding window."""
    return "" if arch.sliding_window else "some layer must have a sliding window"


def one_window(arch: Architecture, spec: MoESpec) -> str:
    """All layers have the same sliding window, or none."""
    mixed = Trait.MIXED_WINDOW in arch.traits
    return "all layers must have the same sliding window" if mixed else ""


def one_rotary(arch: Architecture, spec: MoESpec) -> str:
    """All layers have the same rotary embedding."""
    own = {Trait.LAYERS_WITHOUT_ROTARY, Trait.LAYER_ROTARY} & set(arch.traits)
    return "all layers must have the same rotary embedding" if own else ""


def one_rotary_base(arch: Architecture, spec: MoESpec) -> str:
    """All rotary embeddings have the same base."""
    own = Trait.LAYER_ROTARY in arch.traits
    return "all rotary embeddings must have the same base" if own else ""


def usual_yarn(arch: Architecture, spec: MoESpec) -> str:
    """What yarn multiplies queries and keys by is worked out of its factor."""
    # llama.cpp's converter leaves mscale out, and versions of vLLM differ.
    rope = arch.fields["rope_parameters"]
    own = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(name)]
    if rope.get("rope_type") != "yarn" or not own:
        return ""
    return f"rotary embeddings of rope_type yarn may not heed {' and '.join(own)}"


def interleaved(arch: Architecture, spec: MoESpec) -> str:
    """Rotary embeddings are of neighbouring channels."""
    neighbours = arch.fields.get("rope_interleave", True)
    return "" if neighbours else "rotary embeddings are of neighbouring channels"


def no_dynamic_rope(arch: Architecture, spec: MoESpec) -> str:
    """Rotary embeddings do not grow with the text."""
    dynamic = arch.fields["rope_parameters"].get("rope_type") == "dynamic"
    return "rotary embeddings do not grow with the text (rope_type dynamic)" if dynamic else ""


def unscaled_rope(arch: Architecture, spec: MoESpec) -> str:
    """Rotary embeddings are not scaled."""
    kind = arch.fields["rope_parameters"].get("rope_type", "default")
    return "" if kind == "default" else f"rotary embeddings are not scaled (rope_type {kind})"
