"""What training makes of a split, by the tokens spent.

Trains one split in several ways with the same tokens through the command line, evaluates each on
every text, and prints perplexity over the dense model's before and after. A text that was not
trained on shows whether healing costs other abilities.

    python benchmarks/heal.py --dense MODEL --split SPLIT --data TEXT --text TEXT [--text TEXT …]
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from command import upcycle
from rich.console import Console
from rich.table import Table

# Flags of each line of the table, at the same tokens.
WAYS: dict[str, list[str]] = {
    "heal": ["--recipe", "heal"],
    "next token only": ["--recipe", "heal", "--distill", "0"],
    "distil only": ["--recipe", "heal", "--set", "next_token=0"],
    "CMoE's low-rank recipe": [
        *("--recipe", "lora", "--lora", "8", "--set", "lora_alpha=32", "--lr", "5.95e-5"),
        *("--set", "router_lr=1e-3", "--merge"),
    ],
    "heal, MoE only": ["--recipe", "heal", "--train", "moe"],
    "heal, routers only": ["--recipe", "heal", "--train", "router"],
    "heal, layers matched": ["--recipe", "heal", "--set", "match_layers=1"],
    "heal, dense router gradient": ["--recipe", "heal", "--set", "dense_router_gradient=true"],
}


def evaluate(args: argparse.Namespace, model: str) -> dict[str, float]:
    """Perplexity over the dense model's, by text."""
    texts = [part for text in args.text for part in ("--text", text)]
    report = upcycle(
        *("eval", model, "--against", args.dense, "--tokens", str(args.eval_tokens), *texts)
    )
    return {Path(row["text"]).name: row["perplexity_ratio"] for row in report["texts"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dense", required=True)
    parser.add_argument("--split", required=True, help="what `upcycle convert` made of it")
    parser.add_argument("--data", required=True, help="as `upcycle finetune --data`")
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--text", action="append", required=True, help="repeatable")
    parser.add_argument("--eval-tokens", type=int, default=4096)
    parser.add_argument("--ways", nargs="*", default=list(WAYS)[:4], choices=list(WAYS))
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="for every way")
    parser.add_argument("--out", type=Path, required=True, help="scratch, emptied after")
    parser.add_argument("--json", type=Path, help="results; what it holds is not measured again")
    args = parser.parse_args()

    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    if "before" not in rows:
        rows["before"] = evaluate(args, args.split)
    for way in args.ways:
        if way in rows:
            continue
        report = upcycle(
            *("finetune", args.split, "-o", str(args.out), "--overwrite", "--data", args.data),
            *("--teacher", args.dense, "--tokens", str(args.tokens), *WAYS[way], *args.flags),
        )
        rows[way] = evaluate(args, str(args.out)) | {
            "held out": report["after"]["perplexity"] / report["before"]["perplexity"],
            "minutes": report["seconds"] / 60,
            "tokens_per_second": report["tokens"] / report["seconds"],
        }
        print(json.dumps({way: rows[way]}), file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2))
    shutil.rmtree(args.out, ignore_errors=True)
    names = list(rows["before"])
    table = Table("", *names, "minutes", title=f"perplexity over dense, {args.tokens:,} tokens")
    for way, row in rows.items():
        minutes = f"{row['minutes']:.0f}" if "minutes" in row else ""
        table.add_row(way, *(f"{row[name]:.3f}" for name in names), minutes)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
