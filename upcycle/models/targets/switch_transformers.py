"""Switch Transformers: T5 whose FFNs are experts, of which a token gets one, times its probability.

The class drops what is beyond an expert's capacity in a sequence, 64 tokens by default: here there
is no such limit. Probabilities are worked out in float32, but rounded to the model's dtype before
the expert is chosen, and are not renormalised, so that an expert's gain is E. Where every layer has
experts, as here (a dense layer would have their width), transformers leaves its balancing losses
out: who trains the model adds their own.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from upcycle.core.types import MoELayer
from upcycle.models.names import EMBEDDINGS, HEAD
from upcycle.models.runtimes import Run
from upcycle.models.targets.base import (
    TARGETS,
    Gains,
    MoESpec,
    MoETarget,
    Named,
    Routing,
    with_routed_gain,
)
from upcycle.models.targets.limits import unknown
from upcycle.models.traits import Architecture, Trait

NO_LIMIT = 2**31 - 1
"""Tokens of a sequence that one expert takes."""
SAME = (
    *("vocab_size", "d_kv", "num_heads", "num_layers", "num_decoder_layers", "layer_norm_epsilon"),
    *("relative_attention_num_buckets", "relative_attention_max_distance", "dropout_rate"),
    *("initializer_factor", "use_cache", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
    *("pad_token_id", "decoder_start_token_id", "n_positions", "task_specific_params"),
)
"""Fields that it spells as T5 does."""


def config(arch: Architecture, spec: MoESpec) -> dict[str, Any]:
    return {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "d_model": arch.hidden_size,
        "d_ff": spec.geometry.expert_size,
        "dense_act_fn": arch.fields["hidden_act"],
        "num_experts": spec.geometry.num_experts,
        "num_sparse_encoder_layers": arch.fields["num_layers"],
        "num_sparse_decoder_layers": arch.fields["num_decoder_layers"],
        "expert_capacity": NO_LIMIT,
        "router_jitter_noise": 0.0,
        "router_dtype": "float32",
        "router_bias": False,
    }


def limit(arch: Architecture) -> str:
    """It scales logits where embeddings are tied, and nowhere else; what is not tied can be scaled
    beforehand."""
    scaled = math.isclose(arch.fields["logits_scaling"], math.sqrt(arch.hidden_size))
    if scaled or not arch.tied:
        return ""
    return (
        "switch_transformers divides logits of tied embeddings by the root of d_model, which the "
        "source does not (`untied=True`)"
    )


def outer(arch: Architecture, tensors: Mapping[str, Tensor]) -> Named:
    """Untied, each stack has embeddings of its own, and the head what logits are divided by."""
    if arch.tied:
        return
    for stack in ("encoder", "decoder"):
        yield f"{stack}.embed_tokens.weight", tensors[EMBEDDINGS]
    head, scaling = tensors[HEAD], arch.fields["logits_scaling"]
    yield HEAD, head if scaling == 1 else (head.float() / scaling).to(head.dtype)


def experts(layer: MoELayer, gains: Gains) -> Named:
    yield "mlp.router.classifier.weight", layer.router_ED
    for e in range(layer.num_experts):
        ffn = with_routed_gain(layer.expert(e), gains)
        yield f"mlp.experts.expert_{e}.wi.weight", ffn.up_FD
        yield f"mlp.experts.expert_{e}.wo.weight", ffn.down_DF


TARGETS.add(
    "switch_transformers",
    MoETarget(
        "switch_transformers",
        routing=Routing("softmax", "never", shared_gate=None, in_model_dtype=True),
        dense_layers="none",
        split_rank=1,
        copy_rank=1,
        config=config,
        fields=SAME,
        limit=limit,
        outer=outer,
        experts=experts,
        runtimes={
            "llama.cpp": (unknown,),
            "vLLM": (unknown,),
            "MLX": (unknown,),
            "transformers 4": (),
        },
        ran={
            "transformers 4": Run("4.57.6", "2026-11-29", "splits and copies of random models"),
        },
        accepts=frozenset({Trait.UNSQUARED, Trait.LOGITS_SCALING}),
        requires=frozenset({Trait.ENCODER, Trait.RELATIVE_POSITIONS, Trait.UNGATED}),
        most_top_k=1,
        lora=(),
        attention=("q", "k", "v", "o", "wi", "wo"),
        router="mlp.router.classifier.weight",
        linear_router="mlp.router.classifier",
    ),
)
