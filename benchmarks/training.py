"""What `upcycle finetune`'s loop costs beside a bare PyTorch loop and transformers' Trainer.

All take the same number of steps over the same sequences of the same model, next token only, AdamW,
gradients clipped, in turn and each in a process of its own. Starting up and validation are not
counted in the time. The memory is the peak of one more process, whose allocator gives back what is
free.

    python benchmarks/training.py --model MOE --out SCRATCH
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import upcycle
from upcycle.finetune.data import batch_rows, training_data
from upcycle.models.config import read_config

LR, CLIP, BETAS = 1e-5, 1.0, (0.9, 0.95)
# glibc gives back what it got by mmap. Left to itself it raises the threshold and hoards up to a
# gigabyte, one loop more than the other by accident. (Giving back takes time.)
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


def sequences(args: argparse.Namespace) -> torch.Tensor:
    """The training tokens [sequences, seq_len]."""
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
    return data.tokens_BL


def load(args: argparse.Namespace) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    return model.train()


def bare(args: argparse.Namespace) -> float:
    """Seconds of a loop as one would write it down."""
    tokens_BL, model = sequences(args), load(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=0)
    start = time.monotonic()
    for step in range(args.steps):
        rows = batch_rows(len(tokens_BL), args.batch_size, step, seed=0)
        for part in rows.split(args.micro_batch):
            loss = model(input_ids=tokens_BL[part], labels=tokens_BL[part], use_cache=False).loss
            (loss * len(part) / args.batch_size).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return time.monotonic() - start


def trainer(args: argparse.Namespace) -> float:
    """Seconds of transformers' Trainer."""
    tokens_BL, model = sequences(args), load(args)
    arguments = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.batch_size // args.micro_batch,
        learning_rate=LR,
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": row_L, "labels": row_L} for row_L in tokens_BL]
    return float(Trainer(model, arguments, train_dataset=rows).train().metrics["train_runtime"])


def ours(args: argparse.Namespace) -> float:
    """Seconds of the steps of `upcycle finetune`."""
    done = upcycle.finetune(
        args.model,
        args.out,
        preset="specialise",
        overwrite=True,
        device="cpu",
        lr=LR,
        router_lr=LR,
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
    return done.seconds


WAYS = {"bare loop": bare, "transformers Trainer": trainer, "upcycle finetune": ours}


def alone(way: str, **environment: str) -> dict[str, float]:
    """What a process of its own prints, which runs this way with this script's arguments."""
    command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
    found = os.environ | environment
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=found)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Mixture-of-Experts")
    parser.add_argument("--out", type=Path, required=True, help="scratch, emptied after")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help="run this one alone and print its JSON")
    args = parser.parse_args()
    if args.way:
        seconds = WAYS[args.way](args)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}))
        return

    rounds = [{way: alone(way)["seconds"] for way in WAYS} for _ in range(args.rounds)]
    peaks = {way: alone(way, **GIVE_BACK)["peak_bytes"] for way in WAYS}
    shutil.rmtree(args.out, ignore_errors=True)
    tokens = args.steps * args.batch_size * args.seq_len
    table = Table("", "tokens/s", "over bare", "peak GB", title="medians, each over its own round")
    for way in WAYS:
        table.add_row(
            way,
            f"{statistics.median(tokens / times[way] for times in rounds):.1f}",
            f"{statistics.median(times['bare loop'] / times[way] for times in rounds):.2f}",
            f"{peaks[way] / 1e9:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
