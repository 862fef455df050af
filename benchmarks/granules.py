"""What experts cost when served: one FFN layer, dense, split into 8 to 256 granules, and as 8
pruned copies.

A granule is a part of the FFN as wide as a routed expert; a quarter of them are the shared expert.
Half of all are active, as in the default recipe; of the copies, each of which keeps half of the
neurons, one is. Runs transformers' own Qwen2-MoE block (`grouped_mm`)
beside the dense FFN on random weights, prefill (512 tokens) and decode (1 and 8 tokens), in turn,
and prints the median time over the dense FFN's of the same round.

    python benchmarks/granules.py [--device cuda]
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, Qwen2MoeConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

TOKENS = {"prefill 512": 512, "decode 8": 8, "decode 1": 1}


def dense_ffn(hidden: int, neurons: int) -> nn.Module:
    return LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=1))


def granules(neurons: int, count: int) -> dict[str, int]:
    quarter, size = count // 4, neurons // count
    return {
        "num_experts": count - quarter,
        "num_experts_per_tok": quarter,
        "moe_intermediate_size": size,
        "shared_expert_intermediate_size": quarter * size,
    }


def pruned_copies(neurons: int, count: int) -> dict[str, int]:
    return {
        "num_experts": count,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": neurons // 2,
        "shared_expert_intermediate_size": 0,
    }


def moe_block(hidden: int, shape: dict[str, int], implementation: str) -> nn.Module:
    config = Qwen2MoeConfig(hidden_size=hidden, num_hidden_layers=1, norm_topk_prob=False, **shape)
    config._experts_implementation = implementation
    return Qwen2MoeSparseMoeBlock(config)


def seconds(block: nn.Module, x_BLD: torch.Tensor) -> float:
    repeats = 1 if x_BLD.shape[1] > 64 else 10
    start = time.perf_counter()
    for _ in range(repeats):
        block(x_BLD)
    if x_BLD.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--neurons", type=int, default=8192)
    parser.add_argument("--granules", type=int, nargs="*", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--pruned-copies", type=int, nargs="*", default=[8])
    parser.add_argument("--implementation", default="grouped_mm")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    shapes = {f"{n} granules": granules(args.neurons, n) for n in args.granules}
    shapes |= {f"{n} pruned copies": pruned_copies(args.neurons, n) for n in args.pruned_copies}
    torch.manual_seed(0)
    blocks = {"dense": dense_ffn(args.hidden, args.neurons)}
    for name, shape in shapes.items():
        blocks[name] = moe_block(args.hidden, shape, args.implementation)
    for block in blocks.values():
        block.to(args.device, torch.bfloat16).eval()
        for parameter in block.parameters():
            parameter.normal_(std=0.02)
    rows: list[dict[str, Any]] = [
        {"experts": name, "size": shape["moe_intermediate_size"]} for name, shape in shapes.items()
    ]
    for name, tokens in TOKENS.items():
        x_BLD = torch.randn(1, tokens, args.hidden, dtype=torch.bfloat16, device=args.device)
        for block in blocks.values():
            seconds(block, x_BLD)
        rounds = [{n: seconds(b, x_BLD) for n, b in blocks.items()} for _ in range(args.rounds)]
        for row in rows:
            row[name] = statistics.median(r[row["experts"]] / r["dense"] for r in rounds)
    table = Table("experts", "neurons", *TOKENS, title="time over the dense FFN's, half active")
    for row in rows:
        table.add_row(row["experts"], str(row["size"]), *(f"{row[name]:.2f}" for name in TOKENS))
    Console(width=100).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
