"""What the calibration text does to each kind of text.

Converts a model on several calibration texts through the command line, with the same flags, and
evaluates each result on every kind of text: perplexity over the dense model's, and beside it the
worst row of the conversion's own check. `--leave-out` also fits without each of those kinds of the
builtin text, and shows its probe with and without.

    python benchmarks/calibration.py --model MODEL --text FILE [--text FILE …] \
        --calibration mixed builtin --out SCRATCH [--json FILE] [--flags --active 0.5]
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from command import upcycle
from rich.console import Console
from rich.table import Table

from upcycle.models.text import KINDS, shipped


def convert(args: argparse.Namespace, calibration: str, texts: list[str]) -> dict[str, Any]:
    """One line of the table."""
    start = time.monotonic()
    made = upcycle(
        *("convert", args.model, "-o", str(args.out), "--overwrite", *args.flags),
        *("--calibration", calibration),
    )
    seconds = time.monotonic() - start
    found = upcycle(
        *("eval", str(args.out), "--against", args.model, "--tokens", str(args.eval_tokens)),
        *(word for text in texts for word in ("--text", text)),
    )
    check = made["check"] or {}
    return {
        "calibration": calibration,
        "dense_layers": made["plan"]["dense_layers"],
        "active_ffn_ratio": made["plan"]["active_ffn_ratio"],
        "seconds": seconds,
        "check": {"kind": check.get("worst_kind"), "ratio": check.get("perplexity_ratio")},
        "kinds": {
            Path(row["text"]).name: {
                "ratio": row["perplexity_ratio"],
                "worst_window": row["worst_window_ratio"],
            }
            for row in found["texts"]
        },
    }


def without(kind: str, folder: Path) -> str:
    """The builtin text less one kind, as a file."""
    path = folder / f"without-{kind}.jsonl"
    kept = [shipped("docs", other) for other in KINDS if other not in (kind, "chat")]
    rows = [((i + 0.5) / len(found), text) for found in kept for i, text in enumerate(found)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for _, text in sorted(rows)))
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", action="append", default=[], help="repeatable")
    parser.add_argument("--calibration", nargs="*", default=["mixed", "builtin"])
    parser.add_argument("--leave-out", nargs="*", default=[], choices=KINDS)
    parser.add_argument("--eval-tokens", type=int, default=5632)
    parser.add_argument("--out", type=Path, required=True, help="scratch, emptied after")
    parser.add_argument("--json", type=Path, help="results; what it holds is not measured again")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of convert")
    args = parser.parse_args()

    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    names = [*args.calibration, *(without(kind, args.out.parent) for kind in args.leave_out)]
    for name in names:
        if name in (row["calibration"] for row in rows):
            continue
        rows.append(convert(args, name, [*args.text]))
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2) + "\n")
    shutil.rmtree(args.out, ignore_errors=True)
    kinds = list(rows[0]["kinds"])
    table = Table("calibration", "dense", *kinds, "check's worst", "seconds")
    for row in rows:
        cells = [f"{row['kinds'][kind]['ratio']:.2f}" for kind in kinds]
        worst = f"{row['check']['ratio'] or 0:.2f} {row['check']['kind'] or ''}"
        dense = ",".join(map(str, row["dense_layers"]))
        table.add_row(Path(row["calibration"]).name, dense, *cells, worst, f"{row['seconds']:.0f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
