"""GraniteMoE Swash: granitemoeshared with a window or none, and a rotary embedding or none, on each
layer, and attention sinks.

A sink takes a share of a head's attention from all tokens; of a source without sinks they are so
low that this share is zero in every dtype, and stays so, as it has no gradient.

The class has no sdpa: transformers loads it with eager attention by itself, whose memory grows with
the square of the text, and refuses attn_implementation="sdpa"; flex_attention trains it, and flash
attention from version 3 on generates with it. So what has none of the traits that it is made for is
better off elsewhere.

llama.cpp has the class since b10514 as granite-swa, with layers without a rotary embedding, but one
base for the others; it was seen to abort where no layer has a window. vLLM's was only read: it has
no biases, and its first version turns every layer; mlx-lm and transformers 4 do not have it.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from upcycle.core.types import MoELayer
from upcycle.models.targets import granitemoeshared
from upcycle.models.targets.base import (
    TARGETS,
    Gains,
    MoESpec,
    MoETarget,
    Named,
    Routing,
    fused,
)
from upcycle.models.targets.limits import (
    heads_fill_hidden,
    no_biases,
    one_rotary,
    one_rotary_base,
    silu_only,
    unknown,
    usual_yarn,
    window_needed,
)
from upcycle.models.traits import Architecture, Trait

SILENT_SINK = -3e4  # a logit beside those of attention; float16 ends at -65504


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    return {
        "architectures": ["GraniteMoeSWAForCausalLM"],
        **granitemoeshared.shared_fields(arch, spec),
        "layer_types": arch.fields["layer_types"],
        "layer_rope_theta": arch.fields["layer_rope_theta"],
        # llama.cpp's converter turns every layer unless this is there.
        "no_rope_layers": [int(bool(theta)) for theta in arch.fields["layer_rope_theta"]],
        # The class makes the mask of a window even where no layer uses it.
        "sliding_window": arch.sliding_window or arch.fields["max_position_embeddings"],
    }


def experts(layer: MoELayer, gains: Gains) -> Named:
    yield "block_sparse_moe.router.weight", layer.router_ED
    yield from fused(layer, gains, "block_sparse_moe.experts.")
    yield from granitemoeshared.shared_mlp(layer, gains)


def extra(arch: Architecture, layer: Mapping[str, Tensor]) -> Named:
    yield from granitemoeshared.extra(arch, layer)
    if Trait.SINKS not in arch.traits:
        heads = arch.fields["num_attention_heads"]
        yield "self_attn.sinks", layer["self_attn.q_proj.weight"].new_full((heads,), SILENT_SINK)


MADE_FOR = frozenset(
    {Trait.LAYERS_WITHOUT_ROTARY, Trait.LAYER_ROTARY, Trait.SINKS, Trait.MIXED_WINDOW}
)
TARGETS.add(
    "granitemoe_swa",
    MoETarget(
        "granitemoe_swa",
        routing=Routing("softmax", "always", shared_gate=1.0),
        dense_layers="none",
        split_rank=6,
        copy_rank=6,
        config=config,
        experts=experts,
        runtimes={
            "llama.cpp": (silu_only, window_needed, heads_fill_hidden, one_rotary_base, usual_yarn),
            "vLLM": (silu_only, no_biases, one_rotary, usual_yarn),
            "MLX": (unknown,),
            "transformers 4": (unknown,),
        },
        accepts=granitemoeshared.MULTIPLIERS
        | MADE_FOR
        | {Trait.QKV_BIAS, Trait.O_BIAS, Trait.SLIDING_WINDOW},
        made_for=MADE_FOR,
        extra=extra,
        lora=("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
        router="block_sparse_moe.router.weight",
    ),
)
