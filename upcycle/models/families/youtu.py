"""Youtu-LLM (2B): DeepSeek-V3's attention, keys and values made from a latent, with dense FFNs.

Only a part of each head is rotated, and that of the keys is one for all heads. `attention_bias`
puts biases on the matrices that make the latents, and on the attention's output.
"""

from upcycle.models.families.base import ANY, FAMILIES, DenseFamily
from upcycle.models.traits import Trait

FAMILIES.add(
    "youtu",
    DenseFamily(
        "youtu",
        always={Trait.LATENT_ATTENTION: "youtu always has it"},
        inert={"embedding_initializer_range": ANY},
        carried=(
            *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
            "rope_interleave",
        ),
    ),
)
