"""What a number of training tokens buys, by the share that is active: the quality of a split.

Each cell is one model, one way, one active share and one number of tokens: convert, train by
`upcycle finetune`, and measure perplexity over the dense model's, on kinds of text that were
trained on and on one that was not. Ways: the recipe thorough, fitted on the text that is trained
on; the default; a fixed mask, fitted and trained likewise (is routing still worth it?); CMoE with
its low-rank training; and the dense model itself, trained on the same tokens (the honest
denominator). A cell is appended to the results as soon as it is measured, and
none is measured twice, so a run may be stopped and started at any time; splits stay in the scratch
folder for other numbers of tokens.

    python benchmarks/frontier.py --model NAME=FOLDER --kind web=TRAIN,TEST --kind code=TRAIN,TEST \
        --unseen news=TEST --out SCRATCH --json RESULTS [--ways default] [--active 0.5] [--tokens 0]
"""

import argparse
import datetime
import itertools
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

from command import upcycle
from gpu import commit
from rich.console import Console
from rich.table import Table
from specialise import train_dense

from upcycle.finetune.settings import load_training

HEAL = ("--recipe", "heal", "--teacher", "MODEL")
LOW_RANK = (
    *("--recipe", "lora", "--lora", "8", "--set", "lora_alpha=32", "--lr", "5.95e-5"),
    *("--set", "router_lr=1e-3", "--merge"),
)
"""As CMoE has it."""
SAME_TEXT = ("--calibration", "TEXT", "--calibration-tokens", "81920")
"""Fitted on what is trained on, of which each kind must hold a quarter of so many tokens."""
WAYS = {
    "thorough": (("--recipe", "thorough", *SAME_TEXT), HEAL),
    "default": ((), HEAL),
    "a fixed mask": (("--recipe", "static", "--set", "compensate=descent", *SAME_TEXT), HEAL),
    "CMoE, low rank": (("--recipe", "cmoe"), LOW_RANK),
}
"""How each converts, and how it trains."""
DENSE, DENSE_RATE = "the dense model", 0.0125  # half of heal's, as its weights lost nothing
Cell = dict[str, Any]
IDENTITY = ("model", "what", "active", "tokens")


def split_folder(args: argparse.Namespace, cell: Cell) -> Path:
    """The conversion of a cell, which the cells of other tokens share."""
    out: Path = args.out / f"{cell['model']}-{cell['what']}-{cell['active']}"
    if not out.exists():
        convert, text = WAYS[cell["what"]][0], "+".join(train for train, _ in args.kinds.values())
        upcycle(
            *("convert", args.models[cell["model"]], "-o", str(out), "--check", "none"),
            *(text if flag == "TEXT" else flag for flag in convert),
            *("--active", str(cell["active"])),
        )
    return out


def trained_folder(args: argparse.Namespace, cell: Cell) -> tuple[Path, float]:
    """The trained model of a cell, and the minutes that training took."""
    model, out = args.models[cell["model"]], args.out / "trained"
    shutil.rmtree(out, ignore_errors=True)
    data = "+".join(train for train, _ in args.kinds.values())
    if cell["what"] == DENSE:
        lengths = {
            "tokens": cell["tokens"],
            "data": data,
            "relative_lr": DENSE_RATE,
            "distill": 0.0,
        }
        return out, train_dense(model, out, load_training("heal", lengths)) / 60
    training = (model if flag == "MODEL" else flag for flag in WAYS[cell["what"]][1])
    report = upcycle(
        *("finetune", str(split_folder(args, cell)), "-o", str(out), "--data", data),
        *("--tokens", str(cell["tokens"]), *training, *args.flags),
    )
    return out, report["seconds"] / 60


def measure(args: argparse.Namespace, cell: Cell) -> Cell:
    """The cell with perplexity over the dense model's by kind, and the mean of those trained on."""
    if cell["tokens"]:
        folder, minutes = trained_folder(args, cell)
    else:
        folder, minutes = split_folder(args, cell), 0.0
    tests = {kind: test for kind, (_, test) in args.kinds.items()} | args.unseen
    texts = [part for test in tests.values() for part in ("--text", test)]
    report = upcycle(
        *("eval", str(folder), "--against", args.models[cell["model"]]),
        *("--tokens", str(args.eval_tokens), *texts),
    )
    ratios = dict(zip(tests, (row["perplexity_ratio"] for row in report["texts"]), strict=True))
    mean = math.exp(sum(math.log(ratios[kind]) for kind in args.kinds) / len(args.kinds))
    return cell | ratios | {"mean": mean, "minutes": minutes, "commit": commit()}


def cells(args: argparse.Namespace) -> list[Cell]:
    """What is asked for, few tokens first."""
    asked = itertools.product(args.tokens, args.models, args.ways, args.active)
    found = [dict(zip(IDENTITY, (m, w, a, t), strict=True)) for t, m, w, a in asked]
    dense = itertools.product((t for t in args.tokens if t), args.models)
    if args.dense:
        found += [dict(zip(IDENTITY, (m, DENSE, 1.0, t), strict=True)) for t, m in dense]
    return found


def append(file: Path, row: Cell) -> None:
    """Add a row to the results, which keep their own words about the whole."""
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    found["rows"].append([row.get(column) for column in found["columns"]])
    found["date"] = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    file.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", "utf-8")


def show(rows: list[Cell], kinds: list[str]) -> None:
    table = Table(*IDENTITY, *kinds, "mean", "minutes", title="perplexity over the dense model's")
    for row in rows:
        numbers = (f"{row[key]:.2f}" for key in (*kinds, "mean", "minutes"))
        table.add_row(*(str(row[key]) for key in IDENTITY), *numbers)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--kind", action="append", required=True, metavar="NAME=TRAIN,TEST")
    parser.add_argument("--unseen", action="append", default=[], metavar="NAME=TEST")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--active", nargs="*", type=float, default=[0.75, 0.5, 0.25])
    parser.add_argument("--tokens", nargs="*", type=int, default=[0, 32_768, 131_072])
    parser.add_argument("--dense", action="store_true", help="train the dense model, too")
    parser.add_argument("--eval-tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, required=True, help="scratch; splits stay there")
    parser.add_argument("--json", type=Path, required=True, help="results that rows are added to")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of every training")
    args = parser.parse_args()

    args.models = dict(word.split("=", 1) for word in args.model)
    pairs = (word.split("=", 1) for word in args.kind)
    args.kinds = {name: tuple(files.split(",")) for name, files in pairs}
    args.unseen = dict(word.split("=", 1) for word in args.unseen)
    args.out.mkdir(parents=True, exist_ok=True)
    known = json.loads(args.json.read_text("utf-8"))
    rows = [dict(zip(known["columns"], row, strict=True)) for row in known["rows"]]
    done = {tuple(row[key] for key in IDENTITY) for row in rows}
    for cell in cells(args):
        if tuple(cell.values()) not in done:
            rows.append(measure(args, cell))
            append(args.json, rows[-1])
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    show(rows, [*args.kinds, *args.unseen])


if __name__ == "__main__":
    main()
