"""What another runtime's own code for an architecture can't do: one function, one limit.

Each says what stands between the runtime and a model, as a part of a sentence; nothing if nothing
does. Compared with transformers 5 at llama.cpp b11549, vLLM 0.32, mlx-lm 0.32 and
transformers 4.57.6 (dev/log.md).
"""

from upcycle.models.targets.base import MoESpec
from upcycle.models.traits import Architecture, Trait


def unknown(arch: Architecture, spec: MoESpec) -> str:
    return "it does not know the architecture"


def text_alone(arch: Architecture, spec: MoESpec) -> str:
    return "" if arch.whole else "it knows only the model of several parts, not the text model"


def silu_only(arch: Architecture, spec: MoESpec) -> str:
    act = arch.fields["hidden_act"]
    return "" if act in ("silu", "swish") else f"experts compute silu, not {act}"


def gelu_only(arch: Architecture, spec: MoESpec) -> str:
    act = arch.fields["hidden_act"]
    return "" if act == "gelu_pytorch_tanh" else f"experts compute gelu_pytorch_tanh, not {act}"


def all_layers_routed(arch: Architecture, spec: MoESpec) -> str:
    return "every layer must have experts (--keep-dense none)" if spec.dense_layers else ""


def shared_needed(arch: Architecture, spec: MoESpec) -> str:
    return "" if spec.geometry.shared_size else "there must be a shared expert"


def never_renormalises(arch: Architecture, spec: MoESpec) -> str:
    return "weights of experts are not renormalised" if spec.gains.norm_topk_prob else ""


def always_renormalises(arch: Architecture, spec: MoESpec) -> str:
    return "" if spec.gains.norm_topk_prob else "weights of experts are renormalised"


def untied(arch: Architecture, spec: MoESpec) -> str:
    return "output embeddings must be tensors of their own" if arch.tied else ""


def heads_fill_hidden(arch: Architecture, spec: MoESpec) -> str:
    """Where the size of a head is worked out."""
    hidden, heads, size = arch.hidden_size, arch.fields["num_attention_heads"], arch.head_dim
    fills = size * heads == hidden
    return "" if fills else f"heads must be of {hidden} / {heads} channels, not {size}"


def no_biases(arch: Architecture, spec: MoESpec) -> str:
    return "attention has no biases" if Trait.QKV_BIAS in arch.traits else ""


def no_output_bias(arch: Architecture, spec: MoESpec) -> str:
    return "attention has no bias on its output" if Trait.O_BIAS in arch.traits else ""


def no_window(arch: Architecture, spec: MoESpec) -> str:
    window = arch.sliding_window
    return f"attention sees further than {window:,} tokens" if window else ""


def one_window(arch: Architecture, spec: MoESpec) -> str:
    mixed = Trait.MIXED_WINDOW in arch.traits
    return "all layers must have the same sliding window" if mixed else ""


def unscaled_rope(arch: Architecture, spec: MoESpec) -> str:
    kind = arch.fields["rope_parameters"].get("rope_type", "default")
    return "" if kind == "default" else f"rotary embeddings are not scaled (rope_type {kind})"
