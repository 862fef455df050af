"""Copies against the dense model that they were made of, both trained on the same text.

The copies train by `upcycle finetune`, the dense model in a bare loop over the same sequences in
the same order, with the same learning rates and clipping; both are then evaluated on every text.

    python benchmarks/specialise.py --dense MODEL --data TEXT --text TEXT --out SCRATCH
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import torch
from command import upcycle
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from upcycle.core.machine import choose_device
from upcycle.finetune.data import batch_rows, training_data
from upcycle.finetune.schedule import learning_rate
from upcycle.finetune.settings import Training, load_training
from upcycle.finetune.trainable import members, rate_unit
from upcycle.models.config import read_config


def flag(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def evaluate(args: argparse.Namespace, model: str) -> dict[str, float]:
    """Perplexity, by text."""
    texts = [part for text in args.text for part in ("--text", text)]
    report = upcycle("eval", model, "--tokens", str(args.eval_tokens), *texts)
    return {Path(row["text"]).name: row["perplexity"] for row in report["texts"]}


def train_dense(folder: str, out: Path, settings: Training) -> float:
    """Train the dense model as `upcycle finetune` would, and save it; returns seconds."""
    train, _ = training_data(
        Path(folder),
        read_config(Path(folder)).vocab_size,
        settings.data,
        seq_len=settings.seq_len,
        train_tokens=settings.total_steps * settings.step_tokens,
        validation_tokens=settings.held_tokens,
        seed=settings.seed,
    )
    device = choose_device("auto")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
    settings = settings.with_rate(rate_unit(model, [], members(model, [], [])))
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    rest = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    start = time.monotonic()
    for step in range(settings.total_steps):
        rows = batch_rows(len(train), settings.batch_size, step, settings.seed)
        for row in rows.split(settings.micro_batch):
            tokens_BL = train.tokens_BL[row].to(device)
            labels_BL = tokens_BL.where(train.mask_BL[row].to(device), -100)
            loss = model(input_ids=tokens_BL, labels=labels_BL, use_cache=False).loss
            (loss * len(row) / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * learning_rate(settings, step, "other")
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dense", required=True)
    parser.add_argument("--data", required=True, help="as `upcycle finetune --data`")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--text", action="append", required=True, help="repeatable")
    parser.add_argument("--eval-tokens", type=int, default=4096)
    parser.add_argument("--recipes", nargs="*", default=["sparse-upcycling", "drop-upcycling"])
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--out", type=Path, required=True, help="scratch, emptied after")
    parser.add_argument("--json", type=Path, help="results")
    args = parser.parse_args()

    flags = {"tokens": args.tokens, "batch_size": args.batch_size, "lr": args.lr}
    settings = load_training("specialise", flags | {"data": args.data})
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {"dense": evaluate(args, args.dense) | {"minutes": 0.0}}
    trained = args.out / "dense"
    seconds = train_dense(args.dense, trained, settings)
    rows["dense, trained"] = evaluate(args, str(trained)) | {"minutes": seconds / 60}
    shape = ("--experts", str(args.experts), "--top-k", str(args.top_k))
    asked = [part for key, value in flags.items() for part in (flag(key), str(value))]
    for recipe in args.recipes:
        copies, out = str(args.out / "copies"), str(args.out / "trained")
        upcycle("convert", args.dense, "-o", copies, "--overwrite", "--recipe", recipe, *shape)
        rows[f"{recipe}, untrained"] = evaluate(args, copies) | {"minutes": 0.0}
        report = upcycle(
            *("finetune", copies, "-o", out, "--overwrite", "--recipe", "specialise"),
            *("--data", args.data, *asked),
        )
        rows[recipe] = evaluate(args, out) | {"minutes": report["seconds"] / 60}
        print(json.dumps(rows), file=sys.stderr, flush=True)
    shutil.rmtree(args.out)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))
    names = list(rows["dense"])
    table = Table("", *names, title=f"perplexity after {args.tokens:,} tokens")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.2f}" for key in names))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
