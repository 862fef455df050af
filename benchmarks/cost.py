"""What a split costs, in dense forward passes over its calibration tokens.

Alternates the default split through the command line, the check left out, with a plain transformers
forward pass over the same tokens in the same windows, both on the CPU.

    python benchmarks/cost.py --model MODEL --tokens 32768 --out SCRATCH
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import torch
from command import upcycle
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from upcycle.models.calibration import calibration_tokens
from upcycle.models.opening import open_source


@torch.inference_mode()
def forward(folder: Path, tokens_BL: torch.Tensor) -> float:
    """Seconds of the dense model over all windows, logits included."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model(input_ids=tokens_BL[:1])
    start = time.monotonic()
    for window_L in tokens_BL:
        model(input_ids=window_L[None], use_cache=False)
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--active", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="scratch, emptied after")
    parser.add_argument("--json", type=Path, help="results")
    args = parser.parse_args()

    source, sequences = open_source(args.model), args.tokens // args.seq_len
    tokens_BL = calibration_tokens(source, args.calibration, sequences, args.seq_len, seed=0)
    rows: list[dict[str, float]] = []
    for _ in range(args.rounds):
        report = upcycle(
            *("convert", args.model, "-o", str(args.out), "--overwrite", "--check", "none"),
            *("--calibration", args.calibration, "--calibration-tokens", str(args.tokens)),
            *("--active", str(args.active), "--seq-len", str(args.seq_len), "--device", "cpu"),
        )
        rows.append(report["seconds"] | {"dense forward": forward(source.folder, tokens_BL)})
    shutil.rmtree(args.out)
    table = Table("stage", "seconds", "dense forwards", title=f"{args.tokens:,} tokens, medians")
    for stage in rows[0]:
        seconds = statistics.median(row[stage] for row in rows)
        ratio = statistics.median(row[stage] / row["dense forward"] for row in rows)
        table.add_row(stage, f"{seconds:.1f}", f"{ratio:.2f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))
    Console().print(table)


if __name__ == "__main__":
    main()
