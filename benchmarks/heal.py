"""What training makes of a split, by settings and by the tokens spent.

Trains one split in several ways on each of several budgets of tokens through the command line and
evaluates each on every text: perplexity over the dense model's. A text that was not trained on
shows whether healing costs other abilities. A cell, one way on one budget, is a row of a file in
the form of benchmarks/results, written when it is done; what is there is not measured again, and a
cell that was stopped goes on from its saved state.

    python benchmarks/heal.py --dense MODEL --split SPLIT --data TEXT --text TEXT [--text TEXT …] \
        --tokens 8192 32768 --ways heal "rate 1e-4" --json FILE --cells 1
"""

import argparse
import datetime
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from command import measured, upcycle
from rich.console import Console
from rich.table import Table
from tables import Result

# Flags of each way, beside the preset heal.
WAYS: dict[str, list[str]] = {
    "heal": [],
    "next token only": ["--distill", "0"],
    "distil only": ["--set", "next_token=0"],
    "CMoE's low-rank recipe": [
        *("--recipe", "lora", "--lora", "8", "--set", "lora_alpha=32", "--lr", "5.95e-5"),
        *("--set", "router_lr=1e-3", "--merge"),
    ],
    "heal, MoE only": ["--train", "moe"],
    "heal, routers only": ["--train", "router"],
    "heal, dense router gradient": ["--set", "dense_router_gradient=true"],
    "embeddings, too": ["--set", "starts={}"],
    "attention frozen": ["--set", "starts={embeddings: 1, attention: 1}"],
    "rate 1e-4": ["--lr", "1e-4"],
    "rate 3e-4": ["--lr", "3e-4"],
    "rate 6e-4": ["--lr", "6e-4"],
    "slow rise": ["--set", "warmup=0.3"],
    "batch of 4": ["--batch-size", "4"],
    "temperature 2": ["--set", "distill_temperature=2"],
    "teacher's 16 words": ["--set", "teacher_top_k=16"],
    "teacher's 64 words": ["--set", "teacher_top_k=64"],
    "layers matched": ["--set", "match_layers=1"],
    "layers matched at first": ["--set", "match_layers=1", "--set", "match_warmdown=0.3"],
    "attention last": ["--set", "starts={embeddings: 1, norms: 0, ffn: 0.05, attention: 0.3}"],
    "low-rank changes": ["--lora", "16", "--lr", "1e-3", "--merge"],
    "sequences of 256": ["--seq-len", "256"],
    "sequences of 1024": ["--seq-len", "1024"],
}
WITHOUT_TEACHER = ("next token only", "CMoE's low-rank recipe")
COST = {"held out": ",.2f", "minutes": ",.1f", "CPU minutes": ",.1f", "peak GB": ",.2f"}
"""Of the training alone: perplexity of its own held-out text over that before, and what it took."""


def evaluate(args: argparse.Namespace, model: str) -> list[float]:
    """Perplexity over the dense model's, of each text."""
    texts = [part for text in args.text for part in ("--text", text)]
    report = upcycle(
        *("eval", model, "--against", args.dense, "--tokens", str(args.eval_tokens), *texts)
    )
    return [row["perplexity_ratio"] for row in report["texts"]]


def cell(args: argparse.Namespace, way: str, tokens: int) -> list[str | int | float | None]:
    """A row: one way on one budget. What an earlier start of it has left is gone on from, and then
    nobody knows what all of it took."""
    out = args.out / re.sub(r"\W+", "-", f"{way} {tokens}")
    record, begun = out / "upcycle.json", out.with_name(f".{out.name}.partial").exists()
    cost: list[float | None] = [None, None]
    if not record.exists():
        recipe = [] if "--recipe" in WAYS[way] else ["--recipe", "heal"]
        teacher = [] if way in WITHOUT_TEACHER else ["--teacher", args.dense]
        done = measured(
            *("finetune", args.split, "-o", str(out), "--resume", "--data", args.data),
            *(*teacher, "--tokens", str(tokens), *recipe, *WAYS[way], *args.flags),
        )
        cost = [None, None] if begun else [done.cpu_seconds / 60, done.peak_bytes / 1e9]
    report = json.loads(record.read_text("utf-8"))["training"][-1]
    ratios = evaluate(args, str(out))
    shutil.rmtree(out)
    held_out = report["after"]["perplexity"] / report["before"]["perplexity"]
    return [way, tokens, *ratios, held_out, report["seconds"] / 60, *cost]


def study(args: argparse.Namespace) -> Result:
    """What the file holds, or one without rows."""
    if args.json and args.json.exists():
        return Result.model_validate_json(args.json.read_text("utf-8"))
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    names = {Path(text).name: ",.3f" for text in args.text}
    return Result(
        question="What do the settings of healing bring, by the tokens spent?",
        answer="",
        measure="perplexity over the dense model's",
        command=[shlex.join(["python", "benchmarks/heal.py", *sys.argv[1:]])],
        commit=subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
        date=str(datetime.date.today()),
        machine=args.machine,
        seeds=[0],
        conditions=f"Trained on {args.data}.",
        columns={"way": "", "tokens": ",.0f", **names, **COST},
        rows=[],
    )


def show(result: Result) -> None:
    """The rows as a table."""
    table = Table(*result.columns, title=result.measure)
    for row in result.rows:
        formats = zip(row, result.columns.values(), strict=True)
        table.add_row(*("" if cell is None else format(cell, form) for cell, form in formats))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dense", required=True)
    parser.add_argument("--split", required=True, help="what `upcycle convert` made of it")
    parser.add_argument("--data", required=True, help="as `upcycle finetune --data`")
    parser.add_argument("--tokens", type=int, nargs="+", default=[500_000], help="budgets")
    parser.add_argument("--text", action="append", required=True, help="repeatable")
    parser.add_argument("--eval-tokens", type=int, default=4096)
    parser.add_argument("--ways", nargs="*", default=list(WAYS)[:4], choices=list(WAYS))
    parser.add_argument("--cells", type=int, default=sys.maxsize, help="stop after so many")
    parser.add_argument("--machine", default="small machine")
    parser.add_argument("--out", type=Path, required=True, help="scratch, a folder per cell")
    parser.add_argument("--json", type=Path, help="results; what it holds is not measured again")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="for every way")
    args = parser.parse_args()

    result = study(args)
    known = {(row[0], row[1]) for row in result.rows}
    wanted = [("before", 0), *((way, tokens) for tokens in args.tokens for way in args.ways)]
    for way, tokens in [each for each in wanted if each not in known][: args.cells]:
        if tokens:
            row = cell(args, way, tokens)
        else:
            row = [way, 0, *evaluate(args, args.split), *(None for _ in COST)]
        result.rows.append(row)
        print(json.dumps(dict(zip(result.columns, row, strict=True))), file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(result.model_dump_json(indent=2) + "\n", "utf-8")
    show(result)


if __name__ == "__main__":
    main()
