"""A block's experts computed together: all neurons for every token, and those of experts that are
not selected count 0.

It is what the block's class computes, but for rounding. The class hands each token to each of its
experts and adds up what comes back, and for narrow experts that takes longer than their work.
"""

from collections.abc import Iterable
from functools import partial

from torch import Tensor

from upcycle.models.blocks import MoEBlock

HANDING_OVER = 400
"""Neurons that a CPU computes, forward and backward, while a token is handed to one expert: 170 to
780 by `benchmarks/together.py`. On a GPU it was not measured."""
USUAL = {
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
"""What transformers says of experts that are as `hidden` has them."""


def run_together(blocks: Iterable[MoEBlock]) -> None:
    """Let the experts of these blocks run together where that takes less time."""
    for block in blocks:
        if _is_usual(block) and block.first.device.type == "cpu" and pays(block):
            block.experts.forward = partial(forward, block)


def pays(block: MoEBlock) -> bool:
    """Whether all neurons are less work than handing tokens to experts."""
    width = block.experts.down_proj.shape[2]
    return bool(block.num_experts * width < block.top_k * (width + HANDING_OVER))


def _is_usual(block: MoEBlock) -> bool:
    kind = type(block.experts)
    plain = getattr(getattr(kind, "_apply_gate", None), "__name__", "") == "_default_apply_gate"
    return plain and all(getattr(block.experts, name, None) == is_ for name, is_ in USUAL.items())


def forward(block: MoEBlock, x_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What the experts put out together [T, D], by the selected ones and their weights."""
    on_TE = counts(block, chosen_TK, weights_TK)
    width = block.experts.down_proj.shape[2]
    return put_out(block, x_TD, on_TE.repeat_interleave(width, dim=1))


def counts(block: MoEBlock, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What each expert counts for a token [T, E], by the selected experts and their weights."""
    nothing_TE = weights_TK.new_zeros(len(weights_TK), block.num_experts)
    return nothing_TE.scatter(1, chosen_TK, weights_TK)


def put_out(block: MoEBlock, x_TD: Tensor, on_TF: Tensor) -> Tensor:
    """The same, by what each of F neurons in the order of the experts counts for a token."""
    h_TF = hidden(block, x_TD) * on_TF.to(x_TD)
    down_FD: Tensor = block.experts.down_proj.transpose(1, 2).flatten(0, 1)
    return h_TF @ down_FD.to(x_TD)


def hidden(block: MoEBlock, x_TD: Tensor) -> Tensor:
    """What all neurons put out, [T, F], in the order of the experts."""
    first_TF, *up = (x_TD @ part.flatten(0, 1).T.to(x_TD) for part in first_parts(block))
    h_TF: Tensor = block.experts.act_fn(first_TF)
    return h_TF * up[0] if up else h_TF


def first_parts(block: MoEBlock) -> tuple[Tensor, ...]:
    """The matrices [E, M, D] that tokens meet first: gate and up, or up alone."""
    return tuple(block.first.split(block.experts.down_proj.shape[2], dim=1))
