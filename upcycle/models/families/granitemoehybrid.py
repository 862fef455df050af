"""Granite 4 without experts: Mamba and attention layers, multipliers, rotary embedding or none.

Its class has place for experts, of which a dense model has none; what every token passes is its
FFN.
"""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedConfig

from upcycle.models.families.base import ANY, FAMILIES, Blocks, DenseFamily
from upcycle.models.traits import Trait


def rewrite(name: str, tensor: Tensor, config: PreTrainedConfig) -> Mapping[str, Tensor]:
    """The fused matrix as llama's gate and up."""
    if name.endswith("shared_mlp.output_linear.weight"):
        return {name.replace("shared_mlp.output_linear", "mlp.down_proj"): tensor}
    if name.endswith("shared_mlp.input_linear.weight"):
        fused, parts = "shared_mlp.input_linear", ("mlp.gate_proj", "mlp.up_proj")
        pieces = tensor.chunk(2)
        return {name.replace(fused, part): t for part, t in zip(parts, pieces, strict=True)}
    return {name: tensor}


FAMILIES.add(
    "granitemoehybrid",
    DenseFamily(
        "granitemoehybrid",
        always={Trait.MAMBA: "granitemoehybrid has it, or place for it"},
        # Of experts that are not there.
        inert={"num_experts_per_tok": ANY, "router_aux_loss_coef": ANY, "num_local_experts": 0},
        carried=(
            *("position_embedding_type", "time_step_limit", "mamba_n_heads", "mamba_n_groups"),
            *("mamba_d_state", "mamba_d_head", "mamba_d_conv", "mamba_expand", "mamba_chunk_size"),
            *("mamba_conv_bias", "mamba_proj_bias"),
        ),
        understood=frozenset({"shared_intermediate_size"}),
        width=lambda config: int(config.shared_intermediate_size),
        routed=lambda config: bool(config.num_local_experts),
        blocks=Blocks(mixers=("self_attn", "mamba"), ffn="shared_mlp"),
        rewrite=rewrite,
    ),
)
