"""What `upcycle finetune`'s loop costs beside a bare PyTorch loop over the same model.

Both take the same number of steps over the same sequences, next token only, AdamW, gradients
clipped, in turn; validation is not counted.

    python benchmarks/training.py --model MOE --out SCRATCH
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.source import read_config
from upcycle.training.data import batch_rows, training_data


def bare(model_folder: str, tokens_BL: torch.Tensor, steps: int, batch: int, micro: int) -> float:
    """Tokens per second of a loop as one would write it down."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0)
    start = time.monotonic()
    for step in range(steps):
        rows = batch_rows(len(tokens_BL), batch, step, seed=0)
        for part in rows.split(micro):
            loss = model(input_ids=tokens_BL[part], labels=tokens_BL[part], use_cache=False).loss
            (loss * len(part) / batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return steps * batch * tokens_BL.shape[1] / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Mixture-of-Experts")
    parser.add_argument("--out", type=Path, required=True, help="scratch, emptied after")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    folder = Path(args.model)
    data, _ = training_data(
        folder,
        read_config(folder).vocab_size,
        "builtin",
        seq_len=args.seq_len,
        train_tokens=args.steps * args.batch_size * args.seq_len,
        validation_tokens=args.seq_len,
        seed=0,
    )
    speeds: dict[str, list[float]] = {"bare loop": [], "upcycle finetune": []}
    for _ in range(args.rounds):
        speeds["bare loop"].append(
            bare(args.model, data.tokens_BL, args.steps, args.batch_size, args.micro_batch)
        )
        done = upcycle.finetune(
            args.model,
            args.out,
            preset="specialise",
            overwrite=True,
            lr=1e-5,
            balance=0.0,
            z_loss=0.0,
            weight_decay=0.0,
            steps=args.steps,
            batch_size=args.batch_size,
            micro_batch=args.micro_batch,
            seq_len=args.seq_len,
            validation_tokens=args.seq_len,
            validate_every=args.steps,
        )
        speeds["upcycle finetune"].append(done.tokens / done.seconds)
    shutil.rmtree(args.out, ignore_errors=True)
    table = Table("", "tokens/s, median", "all rounds")
    for name, values in speeds.items():
        rounds = ", ".join(f"{value:.0f}" for value in values)
        table.add_row(name, f"{statistics.median(values):.1f}", rounds)
    Console().print(table)
    each = zip(speeds["upcycle finetune"], speeds["bare loop"], strict=True)
    Console().print(f"upcycle over bare: {statistics.median(ours / b for ours, b in each):.2f}")


if __name__ == "__main__":
    main()
