"""What splits cost, by recipe and active ratio, without training.

Converts a model by every recipe at 75, 50 and 25 % active FFN through the command line, evaluates
each on every text in windows (perplexity over the dense model's, KL, top-1 agreement), and
prints a table. Text that was not calibrated on shows how far a conversion is fitted to its
calibration text.

    python benchmarks/quality.py --model MODEL --calibration FILE --text FILE [--text FILE …]
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from command import upcycle
from rich.console import Console
from rich.table import Table

# Flags of each line of the table. The published recipes at their own granularity; ours by the
# asked share, layers kept dense counted as fully active.
RECIPES: dict[str, list[str]] = {
    "default": [],
    "48 experts": ["--experts", "48"],
    "144 experts": ["--experts", "144"],
    "static": ["--recipe", "static"],
    "cmoe": ["--recipe", "cmoe"],
    "llama-moe-v2": ["--recipe", "llama-moe-v2"],
    "llama-moe": ["--recipe", "llama-moe"],
    "moefication": ["--recipe", "moefication"],
    "emoe": ["--recipe", "emoe"],
    "pruned copies": ["--recipe", "pruned-copies"],
    "descent": ["--set", "compensate=descent"],
    "no compensation": ["--set", "compensate=none"],
    "not sequential": ["--set", "sequential=false"],
    "no dense layers": ["--keep-dense", "none"],
    "coactivation": ["--set", "split=coactivation"],
    "12 experts": ["--experts", "12"],
}


def measure(args: argparse.Namespace, name: str, ratio: int, out: Path) -> dict[str, Any]:
    """Convert once and evaluate on every text."""
    start = time.monotonic()
    report = upcycle(
        *("convert", args.model, "-o", str(out), "--overwrite", "--check", "none"),
        *RECIPES[name],
        *("--active", str(ratio / 100)),
        *("--calibration", args.calibration, "--calibration-tokens", str(args.tokens)),
        *("--seq-len", str(args.seq_len)),
    )
    plan = report["plan"]
    shape = f"{plan['top_k']} of {plan['experts']} x {plan['expert_size']} + {plan['shared_size']}"
    row: dict[str, Any] = {
        "recipe": name,
        "ratio": ratio,
        "shape": shape,
        "dense_layers": plan["dense_layers"],
        "active_ffn_ratio": plan["active_ffn_ratio"],
        "seconds": time.monotonic() - start,
        "peak_bytes": report["peak_memory"],
    }
    evaluation = upcycle(
        *("eval", str(out), "--against", args.model, "--tokens", str(args.eval_tokens)),
        *("--seq-len", str(args.seq_len)),
        *(word for text in args.text for word in ("--text", text)),
    )
    for numbers in evaluation["texts"]:
        row[Path(numbers.pop("text")).name] = numbers
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


def plot(rows: list[dict[str, Any]], texts: list[str], path: Path) -> None:
    """Perplexity over the dense model's against the active share: a panel per text, a line per
    recipe."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(texts), figsize=(5 * len(texts), 4), squeeze=False)
    for panel, text in zip(panels[0], (Path(t).name for t in texts), strict=True):
        for name in dict.fromkeys(row["recipe"] for row in rows):
            mine = sorted((r for r in rows if r["recipe"] == name), key=lambda r: r["ratio"])
            shares = [100 * row["active_ffn_ratio"] for row in mine]
            panel.plot(shares, [r[text]["perplexity_ratio"] for r in mine], marker="o", label=name)
        panel.set(title=text, xlabel="active FFN, %", ylabel="perplexity over dense", yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder (a GGUF file is slow to open)")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--text", action="append", required=True, help="repeatable")
    parser.add_argument("--eval-tokens", type=int, default=6144)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--ratios", nargs="*", type=int, default=[75, 50, 25])
    parser.add_argument("--out", type=Path, required=True, help="scratch, emptied after")
    parser.add_argument("--json", type=Path, help="results; what it holds is not measured again")
    parser.add_argument("--plot", type=Path, help="image (pip install upcycle[benchmarks])")
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
    if args.plot:
        plot(rows, args.text, args.plot)


if __name__ == "__main__":
    main()
