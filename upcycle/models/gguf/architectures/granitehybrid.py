"""Granite 4 with Mamba layers."""

from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.models.gguf.architectures.base import STORED, Stored, with_time_step
from upcycle.models.gguf.architectures.granite import multipliers
from upcycle.models.gguf.fields import FULL, LINEAR, Fields, has_in_a_layer, shape_fields
from upcycle.models.gguf.file import GgufFile
from upcycle.models.gguf.metadata import Metadata
from upcycle.models.gguf.restored import from_halves, from_mamba
from upcycle.models.gguf.rope import rope_fields


def fields(file: GgufFile, meta: Metadata) -> Fields:
    """The converter keeps neither `max_position_embeddings` nor the size of chunks, which changes
    nothing but rounding."""
    rotated = meta.take("rope.scaling.finetuned", True)
    shape = shape_fields(file, meta)
    kv_heads = meta.per_layer("attention.head_count_kv", shape["num_hidden_layers"])
    width = meta.number("feed_forward_length")
    inner, heads = meta.number("ssm.inner_size"), meta.number("ssm.time_step_rank")
    own = {
        "intermediate_size": width,
        "shared_intermediate_size": meta.number("expert_shared_feed_forward_length", width),
        "num_key_value_heads": max(kv_heads),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "layer_types": [FULL if count else LINEAR for count in kv_heads],
        "position_embedding_type": "rope" if rotated else "nope",
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "mamba_d_conv": meta.number("ssm.conv_kernel"),
        "mamba_d_state": meta.number("ssm.state_size"),
        "mamba_n_groups": meta.number("ssm.group_count"),
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_expand": inner // shape["hidden_size"],
        "mamba_conv_bias": has_in_a_layer(file, "ssm_conv1d.bias"),
        "mamba_proj_bias": has_in_a_layer(file, "ssm_in.bias"),
        "attention_bias": has_in_a_layer(file, "attn_q.bias"),
    }
    return shape | own | rope_fields(file, meta, shape) | multipliers(meta)


def spelled(name: str) -> tuple[str, ...]:
    """Gate and up are one matrix in transformers."""
    layer, fused, _ = name.partition("shared_mlp.input_linear")
    if fused:
        return tuple(f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up"))
    return with_time_step(name.replace("shared_mlp.output_linear", "mlp.down_proj"))


def restored(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    return from_halves(name, from_mamba(name, tensor, config), config)


STORED.add("granitehybrid", Stored("granitemoehybrid", fields, spelled=spelled, restored=restored))
