"""What splits cost, by recipe and active ratio, without training.

Converts a model by every recipe at 75, 50 and 25 % active FFN through the command line, evaluates
each on every text in windows of 512 (perplexity over the dense model's, KL, top-1 agreement), and
prints a table. Text that was not calibrated on shows how far a conversion is fitted to its
calibration text.

    python benchmarks/quality.py --model MODEL --calibration FILE --text FILE [--text FILE …]
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Flags per recipe and active ratio. Granules N, shared S and top_k K: (S + K) / N is the ratio.
RECIPES: dict[str, dict[str, Any]] = {
    "llama-moe": {
        "recipe": "llama-moe",
        "shapes": {75: (16, 0, 12), 50: (16, 0, 8), 25: (16, 0, 4)},
    },
    "moefication": {
        "recipe": "moefication",
        "shapes": {75: (16, 0, 12), 50: (16, 0, 8), 25: (16, 0, 4)},
    },
    "emoe": {"recipe": "emoe", "shapes": {75: (64, 0, 48), 50: (64, 0, 32), 25: (64, 0, 16)}},
    "cmoe": {"recipe": "cmoe", "shapes": {75: (16, 2, 10), 50: (16, 2, 6), 25: (16, 2, 2)}},
    "coactivation 16": {"shapes": {75: (16, 4, 8), 50: (16, 4, 4), 25: (16, 2, 2)}},
    "coactivation 64": {"shapes": {75: (64, 16, 32), 50: (64, 16, 16), 25: (64, 8, 8)}},
    "predictability 64": {
        "flags": ["--split", "predictability"],
        "shapes": {75: (64, 16, 32), 50: (64, 16, 16), 25: (64, 8, 8)},
    },
    "predictability 192": {
        "flags": ["--split", "predictability"],
        "shapes": {75: (192, 48, 96), 50: (192, 48, 48), 25: (192, 24, 24)},
    },
}


def upcycle(*arguments: str) -> dict[str, Any]:
    """One command's JSON."""
    command = [sys.executable, "-m", "upcycle", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def measure(args: argparse.Namespace, name: str, ratio: int, out: Path) -> dict[str, Any]:
    """Convert once and evaluate on every text."""
    entry = RECIPES[name]
    experts, shared, top_k = entry["shapes"][ratio]
    start = time.monotonic()
    report = upcycle(
        *("convert", args.model, "-o", str(out), "--overwrite", "--check", "none"),
        *("--recipe", entry.get("recipe", "default"), *entry.get("flags", [])),
        *("--experts", str(experts), "--shared-experts", str(shared), "--top-k", str(top_k)),
        *("--calibration", args.calibration, "--calibration-tokens", str(args.tokens)),
        *("--keep-dense", args.keep_dense),
    )
    row: dict[str, Any] = {
        "recipe": name,
        "ratio": ratio,
        "shape": f"S{shared}A{top_k}E{experts}",
        "active_ffn_ratio": report["plan"]["active_ffn_ratio"],
        "seconds": time.monotonic() - start,
        "peak_bytes": report["peak_memory"],
    }
    for text in args.text:
        numbers = upcycle(
            *("eval", str(out), "--against", args.model, "--text", text),
            *("--tokens", str(args.eval_tokens)),
        )
        del numbers["load"]
        row[Path(text).name] = numbers
    return row


def show(rows: list[dict[str, Any]], texts: list[str]) -> None:
    """Perplexity over the dense model's, a line per recipe."""
    console = Console(width=120)
    for text in (Path(t).name for t in texts):
        dense = rows[0][text]["perplexity_against"]
        table = Table("recipe", "75 %", "50 %", "25 %", title=f"{text} (dense {dense:.2f})")
        for name in dict.fromkeys(row["recipe"] for row in rows):
            ratios = {r["ratio"]: r[text]["perplexity_ratio"] for r in rows if r["recipe"] == name}
            table.add_row(name, *(f"{ratios[r]:.2f}" if r in ratios else "" for r in (75, 50, 25)))
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder (a GGUF file is slow to open)")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    parser.add_argument("--text", action="append", required=True, help="repeatable")
    parser.add_argument("--eval-tokens", type=int, default=6144)
    parser.add_argument("--keep-dense", default="none")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--ratios", nargs="*", type=int, default=[75, 50, 25])
    parser.add_argument("--out", type=Path, required=True, help="scratch, emptied after")
    parser.add_argument("--json", type=Path, help="results; what it holds is not measured again")
    args = parser.parse_args()

    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    done = {(row["recipe"], row["ratio"]) for row in rows}
    for name in args.recipes:
        for ratio in args.ratios:
            if (name, ratio) in done:
                continue
            rows.append(measure(args, name, ratio, args.out))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=2))
    shutil.rmtree(args.out, ignore_errors=True)
    show(rows, args.text)


if __name__ == "__main__":
    main()
