"""Whether llama.cpp computes what transformers computes: perplexity of the same tokens by both.

Converts each checkpoint to GGUF in float32 by llama.cpp's own script and measures it with its own
llama-perplexity, keys and values in float32; then with transformers in the same windows. With
--types also what quantisation by llama-quantize makes of it.

    python benchmarks/llama_cpp.py --llama-cpp CHECKOUT --binaries BUILD/bin \
        --text TEXT --out SCRATCH CHECKPOINT [CHECKPOINT …]
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW = 512  # tokens; of each the second half is predicted


def by_llama_cpp(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, float | str]]:
    """Perplexity in float32, then in each type, or the last line of what it says instead."""
    gguf, quantised = args.out / "model.gguf", args.out / "quantised.gguf"
    convert = [sys.executable, args.llama_cpp / "convert_hf_to_gguf.py", folder]
    yield "F32", _perplexity(args, [*convert, "--outfile", gguf, "--outtype", "f32"], gguf)
    for name in args.types:
        quantise = [args.binaries / "llama-quantize", gguf, quantised, name]
        yield name, _perplexity(args, quantise, quantised)
    gguf.unlink(missing_ok=True)


def _perplexity(args: argparse.Namespace, make: list[str | Path], gguf: Path) -> float | str:
    measure = [args.binaries / "llama-perplexity", "-m", gguf, "-f", args.text]
    windows = ["--chunks", str(args.windows), "-c", str(WINDOW)]
    for command in (make, [*measure, *windows, "-fa", "off", "-ctk", "f32", "-ctv", "f32"]):
        run = subprocess.run(command, capture_output=True, text=True)
        said = run.stdout + run.stderr
        if run.returncode:
            errors = [line for line in said.splitlines() if "rror" in line]
            return (errors or [f"exit status {run.returncode}"])[-1]
    found = re.search(r"Final estimate: PPL = (\S+)", said)
    return float(found[1]) if found else "no estimate"


@torch.inference_mode()
def by_transformers(args: argparse.Namespace, folder: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids_T = torch.tensor(tokenizer(args.text.read_text())["input_ids"])
    starts_with_bos = ids_T[0] == tokenizer.bos_token_id
    losses = []
    for window_L in ids_T[: args.windows * WINDOW].view(-1, WINDOW):
        if starts_with_bos:
            window_L[0] = tokenizer.bos_token_id
        logits_LV = model(input_ids=window_L[None], use_cache=False).logits[0]
        half = slice(WINDOW // 2, WINDOW - 1)
        target_L = window_L[WINDOW // 2 + 1 :]
        losses.append(torch.nn.functional.cross_entropy(logits_LV[half], target_L))
    return float(torch.stack(losses).mean().exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="its sources")
    parser.add_argument("--binaries", type=Path, required=True, help="llama-perplexity's folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} tokens")
    parser.add_argument("--types", nargs="*", default=[], help="such as Q8_0 Q4_0")
    parser.add_argument("--out", type=Path, required=True, help="scratch")
    parser.add_argument("--json", type=Path, help="results")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    table = Table("checkpoint", "architecture", "transformers", "llama.cpp F32", *args.types)
    for folder in args.checkpoints:
        name = json.loads((folder / "config.json").read_text())["model_type"]
        row = {"transformers": by_transformers(args, folder), **dict(by_llama_cpp(args, folder))}
        rows.append({"checkpoint": str(folder), "architecture": name} | row)
        table.add_row(
            folder.name, name, *(f"{v:.3f}" if isinstance(v, float) else v for v in row.values())
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))
    Console().print(table)


if __name__ == "__main__":
    main()
