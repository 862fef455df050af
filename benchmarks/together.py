"""What training takes by running a layer's experts together, beside handing each its tokens.

Forward and backward of 512 tokens in bfloat16 autocast, on random weights and random choices, by
transformers' `grouped_mm` and by `upcycle/finetune/together.py`, in turn; the shortest of some
rounds. What handing a token over costs is what `grouped_mm` takes beyond the experts' neurons, as a
number of neurons: `HANDING_OVER` stands for it, and `pays` is to choose the shorter time.

    python benchmarks/together.py [--channels 576 2048] [--json FILE]
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from upcycle.finetune.together import forward, pays
from upcycle.models.blocks import MoEBlock

TOKENS, NEURONS = 512, {576: 1536, 2048: 4096}
WIDTHS, SHARES = (16, 64, 256), (0.125, 0.25, 0.5, 0.75)
COLUMNS = ("channels", "experts", "neurons", "per token", "by class, ms", "together, ms")
COLUMNS += ("together over class", "handing over, neurons", "together pays")


def block_of(channels: int, experts: int, width: int, top_k: int) -> MoEBlock:
    config = Qwen2MoeConfig(
        hidden_size=channels,
        num_experts=experts,
        moe_intermediate_size=width,
        num_experts_per_tok=top_k,
    )
    config._experts_implementation = "grouped_mm"
    module = Qwen2MoeExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    chooser: Any = SimpleNamespace(top_k=top_k)
    return MoEBlock(0, router=None, experts=module, around=module, chooser=chooser)


def seconds(run: Callable[..., Tensor], block: MoEBlock) -> float:
    """Of a forward and a backward pass."""
    x_TD = torch.randn(TOKENS, block.first.shape[2], requires_grad=True)
    chosen_TK = torch.rand(TOKENS, block.num_experts).topk(block.top_k).indices
    weights_TK = torch.rand(TOKENS, block.top_k, requires_grad=True)
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        y_TD = run(x_TD, chosen_TK, weights_TK)
    y_TD.float().sum().backward()
    return time.perf_counter() - start


def measure(channels: int, width: int, share: float, rounds: int) -> dict[str, Any] | None:
    experts = NEURONS[channels] // width
    top_k = int(share * experts)
    if not top_k:
        return None
    block, other = (block_of(channels, experts, width, top_k) for _ in range(2))
    other.experts.forward = partial(forward, other)
    times = [(seconds(block.experts, block), seconds(other.experts, other)) for _ in range(rounds)]
    by_class, together = (min(column) for column in zip(*times, strict=True))
    neuron = together / (experts * width)
    row = (channels, experts, width, top_k, 1000 * by_class, 1000 * together, together / by_class)
    handing_over = by_class / top_k / neuron - width
    return dict(zip(COLUMNS, (*row, handing_over, "yes" if pays(block) else ""), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, nargs="*", default=list(NEURONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    torch.manual_seed(0)
    cells = itertools.product(args.channels, WIDTHS, SHARES)
    rows = [row for cell in cells if (row := measure(*cell, args.rounds))]
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(
            *(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values())
        )
    Console(width=140).print(table)
    if args.json:
        args.json.write_text(json.dumps([list(row.values()) for row in rows]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
