"""Speed and memory of a conversion at 1.1B parameters.

Makes a llama of TinyLlama's shape with random bfloat16 weights in shards, then measures, each in a
process of its own:

- copy x4 against `cp` of what it wrote, in alternating rounds on the same disk. Both start on a
  synced disk and both are timed until their bytes are on it (`sync`); of the conversion it is the
  whole process that counts, start-up and imports included. What is compared are the medians.
- peak resident memory of copy x4 and of a split, at two depths, to see whether it grows.

    python benchmarks/convert.py --folder SCRATCH --rounds 5 --json results.json

Times are fair only on a machine that does nothing else. On a busy one, a process that computes
(imports) loses more than one that waits for a disk.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

HIDDEN, NEURONS, VOCAB, HEADS, KV_HEADS = 2048, 5632, 32000, 32, 4


def make_llama(folder: Path, layers: int) -> Path:
    """A random checkpoint, one shard per layer, never whole in memory."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    torch.manual_seed(0)
    places: dict[str, str] = {}

    def save(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {n: torch.randn(shape).mul_(0.02).bfloat16() for n, shape in shapes.items()}
        for name in tensors:
            if name.endswith("norm.weight"):
                tensors[name] = torch.ones(HIDDEN, dtype=torch.bfloat16)
            places[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})

    keys = HIDDEN // HEADS * KV_HEADS
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            "self_attn.k_proj.weight": (keys, HIDDEN),
            "self_attn.v_proj.weight": (keys, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            "mlp.gate_proj.weight": (NEURONS, HIDDEN),
            "mlp.up_proj.weight": (NEURONS, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, NEURONS),
            "input_layernorm.weight": (HIDDEN,),
            "post_attention_layernorm.weight": (HIDDEN,),
        }
        save(f"layer-{layer:03}.safetensors", {prefix + n: s for n, s in shapes.items()})
    outer = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    save("outer.safetensors", outer | {"model.norm.weight": (HIDDEN,)})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: enough to have text."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def timed(command: list[str]) -> tuple[str, float]:
    """What a command prints, and its seconds until what it wrote is on the disk."""
    os.sync()
    start = time.monotonic()
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    os.sync()
    return run.stdout, time.monotonic() - start


def convert(model: Path, out: Path, *flags: str) -> dict[str, float]:
    """Seconds and peak bytes of one run of the command line."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "upcycle", "convert", str(model), "-o", str(out)]
    printed, seconds = timed([*command, "--check", "none", "--json", *flags])
    report = json.loads(printed)
    return {
        "process_seconds": seconds,
        "conversion_seconds": report["seconds"]["conversion"],
        "peak_bytes": report["peak_memory"],
        "bytes": sum(p.stat().st_size for p in out.glob("*.safetensors")),
    }


def copy_against_cp(model: Path, scratch: Path, rounds: int) -> list[dict[str, float]]:
    """Alternate copy x4 with `cp` of what it wrote."""
    rows = []
    for _ in range(rounds):
        row = convert(model, scratch / "copy", "--method", "copy", "--experts", "4", "--top-k", "2")
        _, row["cp_seconds"] = timed(["cp", "-r", str(scratch / "copy"), str(scratch / "cp")])
        shutil.rmtree(scratch / "cp")
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="scratch, 20 GB, emptied after")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3, help="of copy x4 and cp in turn")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration of the split")
    parser.add_argument("--split-layers", type=int, nargs="*", default=(2, 6))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    scratch = args.folder / "upcycle-benchmark"
    shutil.rmtree(scratch, ignore_errors=True)
    model = make_llama(scratch / "model", args.layers)
    runs = copy_against_cp(model, scratch, args.rounds)
    shallow = make_llama(scratch / "shallow", args.layers // 2)
    copies = ("--method", "copy", "--experts", "4", "--top-k", "2")
    memory = {
        f"copy x4, {args.layers} layers": max(run["peak_bytes"] for run in runs),
        f"copy x4, {args.layers // 2} layers": convert(shallow, scratch / "o", *copies)[
            "peak_bytes"
        ],
    }
    for layers in args.split_layers:
        source = make_llama(scratch / f"split-{layers}", layers)
        split = convert(source, scratch / "o", "--calibration-tokens", str(args.tokens))
        memory[f"split, {layers} layers, {args.tokens} tokens"] = split["peak_bytes"]
    shutil.rmtree(scratch)
    show(runs, memory)
    if args.json:
        args.json.write_text(json.dumps({"copy_against_cp": runs, "peak_bytes": memory}, indent=2))


def show(runs: list[dict[str, float]], memory: dict[str, float]) -> None:
    console = Console()
    title = f"time, medians of {len(runs)} alternating rounds"
    times = Table("copy x4", "seconds", "over cp", title=title)
    cp = statistics.median(run["cp_seconds"] for run in runs)
    times.add_row(f"cp and sync of {runs[0]['bytes'] / 1e9:.2f} GB", f"{cp:.1f}", "1")
    rows = {
        "conversion_seconds": "conversion alone, without sync",
        "process_seconds": "whole process and sync",
    }
    for name, words in rows.items():
        seconds = statistics.median(run[name] for run in runs)
        times.add_row(words, f"{seconds:.1f}", f"{seconds / cp:.2f}")
    console.print(times)
    peaks = Table("peak resident memory", "GB")
    for name, peak in memory.items():
        peaks.add_row(name, f"{peak / 1e9:.2f}")
    console.print(peaks)


if __name__ == "__main__":
    main()
