"""Nemotron-H: Mamba layers, attention without positions and FFNs without a gate, each a layer.

A layer has one of the three, so most have no FFN. The class ties no embeddings, whatever
config.json says, and knows no multi-token prediction: a checkpoint with such heads is refused.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.models.families.base import ANY, FAMILIES, Blocks, DenseFamily
from upcycle.models.names import EMBEDDINGS
from upcycle.models.traits import Trait

NAMES = {
    "model.embeddings.weight": EMBEDDINGS,
    "mixer.up_proj.weight": "mlp.up_proj.weight",
    "mixer.down_proj.weight": "mlp.down_proj.weight",
}


def rewrite(name: str, tensor: Tensor, config: PreTrainedConfig) -> Mapping[str, Tensor]:
    return {NAMES.get(name, name): tensor}


def extra(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "layer_types": list(config.layers_block_type),
        "rms_norm_eps": config.layer_norm_epsilon,
        "hidden_act": config.mlp_hidden_act,
    }


def bare_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    return tuple(i for i, kind in enumerate(config.layers_block_type) if kind != "mlp")


FAMILIES.add(
    "nemotron_h",
    DenseFamily(
        "nemotron_h",
        always={
            Trait.LONE_BLOCKS: "nemotron_h always has",
            Trait.UNGATED: "nemotron_h has none",
        },
        attention_bias=frozenset(),  # the class never has any
        # Of experts and further heads that are not there; of generating; of kernels.
        inert=dict.fromkeys(
            "n_routed_experts n_shared_experts moe_intermediate_size moe_latent_size "
            "moe_shared_expert_intermediate_size moe_shared_expert_overlap num_experts_per_tok "
            "routed_scaling_factor n_group topk_group norm_topk_prob mtp_layers_block_type".split(),
            ANY,
        ),
        carried=tuple(
            "attention_bias mlp_hidden_act use_mamba_kernels ssm_state_size mamba_num_heads "
            "mamba_head_dim mamba_hidden_act n_groups conv_kernel expand time_step_min "
            "time_step_max time_step_limit time_step_floor use_conv_bias chunk_size "
            "mamba_proj_bias mamba_ssm_cache_dtype use_bias layer_norm_epsilon residual_in_fp32 "
            "hidden_dropout rescale_prenorm_residual num_logits_to_keep sliding_window".split()
        ),
        understood=frozenset({"layers_block_type"}),
        extra=extra,
        routed=lambda config: "moe" in config.layers_block_type,
        bare_layers=bare_layers,
        blocks=Blocks(embeddings=("embeddings",), norm="norm_f", mixers=(), ffn="mixer"),
        ties=False,
        stored={"backbone.": "model."},
        rewrite=rewrite,
    ),
)
