"""What a conversion of an 8B costs on a GPU, and how fast its results are.

A random model of an 8B's shape with a quarter of its layers, or `--layers` of them, is written,
split and copied; then tokens per second of the results are measured beside the dense model's, in
transformers and, where its wheel is installed, in vLLM. Each step is a process of its own, so that
its memory is its own; what no longer fits into the time is left out by name. `bash
benchmarks/gpu.sh` holds it to eight minutes.

    python benchmarks/gpu.py [--out SCRATCH] [--json FILE] [--vllm PYTHON] [--layers N] [--tiny]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SEED = 0
LARGE: Row = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "num_hidden_layers": 8,
    "whole": 32,
    "calibration_tokens": 32768,
    "window": 512,
    "batches": [1, 8, 64],
    "steps": 32,
}
TINY: Row = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "whole": 8,
    "calibration_tokens": 256,
    "window": 32,
    "batches": [1, 2],
    "steps": 2,
}
"""To see on a CPU that it runs."""
RESULTS: dict[str, Row] = {
    "split": {"keep_dense": "none"},
    "copies": {"method": "copy", "experts": 4, "top_k": 2},
}
BOUNDS = {"minutes": 15, "gpu_gb": 24, "host_gb": 3}
"""What the whole 8B is to stay under."""


def make_dense(place: Path, shape: Row, device: str) -> list[Row]:
    """Write the random model, and a tokenizer of one token per byte."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    fields = {name: shape[name] for name in LARGE if name in LlamaConfig().to_dict()}
    torch.manual_seed(SEED)
    with torch.device(device):
        config = LlamaConfig(**fields, max_position_embeddings=8192, bos_token_id=256)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(place / "dense", max_shard_size="1GB")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)} | {"<s>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    whole.save_pretrained(place / "dense")
    return [{"parameters": sum(parameter.numel() for parameter in model.parameters())}]


def convert(place: Path, shape: Row, device: str, result: str) -> list[Row]:
    """Seconds by stage, and the most memory of the process and of the GPU."""
    import torch

    import upcycle
    from upcycle.core.machine import peak_memory

    start = time.monotonic()
    done = upcycle.convert(
        str(place / "dense"),
        place / result,
        device=device,
        seed=SEED,
        check="none",
        calibration="builtin",
        calibration_tokens=shape["calibration_tokens"],
        seq_len=shape["window"],
        overwrite=True,
        **RESULTS[result],
    )
    seconds = time.monotonic() - start
    on_gpu = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    row = {
        "result": result,
        "target": done.plan.target,
        "experts": f"{done.plan.design.geometry.top_k} of {done.plan.design.geometry.num_experts}",
        "seconds": seconds,
        "stages": dict(done.seconds),
        "minutes": seconds * shape["whole"] / shape["num_hidden_layers"] / 60,
        "gpu_gb": on_gpu,
        "host_gb": peak_memory() / 1e9,
    }
    return [row]


def speed(place: Path, shape: Row, device: str, model: str) -> list[Row]:
    """Tokens per second in transformers at each batch size, the median of three rounds."""
    import torch

    from upcycle.evaluation.speed import tokens_per_second
    from upcycle.models.loading import load_model

    loaded = load_model(place / model, torch.bfloat16, torch.device(device))
    generator = torch.Generator().manual_seed(SEED)
    rows = []
    for batch in shape["batches"]:
        tokens_BL = torch.randint(0, 256, (batch, shape["window"]), generator=generator)
        try:
            tokens_per_second(loaded, tokens_BL)  # what runs for the first time is slower
            rounds = [tokens_per_second(loaded, tokens_BL) for _ in range(3)]
        except torch.OutOfMemoryError:  # batched_mm, by which experts decode, gathers their weights
            rows.append({"batch": batch, "why": "out of memory"})
            continue
        prefill, decode = (statistics.median(column) for column in zip(*rounds, strict=True))
        rows.append({"batch": batch, "prefill": prefill, "decode": decode})
    return rows


def vllm_speed(place: Path, shape: Row, device: str, model: str) -> list[Row]:
    """The same in vLLM: of a prompt and one token, and of the tokens after it."""
    from vllm import LLM, SamplingParams

    window, steps = shape["window"], shape["steps"]
    loaded = LLM(str(place / model), dtype="bfloat16", max_model_len=window + steps + 1, seed=SEED)

    def seconds(prompts: list[Row], tokens: int) -> float:
        start = time.perf_counter()
        settings = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        loaded.generate(prompts, settings, use_tqdm=False)
        return time.perf_counter() - start

    rows = []
    for batch in shape["batches"]:
        rounds = []
        for turn in range(4):  # prompts differ, or they would be read from the cache
            prompts = [
                {"prompt_token_ids": [(turn * 83 + row * 29 + i * i) % 256 for i in range(window)]}
                for row in range(batch)
            ]
            read, whole = seconds(prompts, 1), seconds(_shifted(prompts), steps + 1)
            rounds.append((batch * window / read, batch * steps / max(whole - read, 1e-9)))
        prefill, decode = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
        rows.append({"batch": batch, "prefill": prefill, "decode": decode})
    return rows


def _shifted(prompts: list[Row]) -> list[Row]:
    """Other prompts of the same length."""
    return [{"prompt_token_ids": [(t + 7) % 256 for t in p["prompt_token_ids"]]} for p in prompts]


STEPS = {"dense": make_dense, "convert": convert, "speed": speed, "vllm": vllm_speed}


def in_process(python: str, step: str, arguments: list[Any], left: float) -> Any:
    """What a step returns, run by itself; a sentence if it fails or takes longer than is left."""
    if left < 5:
        return "left out: no time"
    command = [python, __file__, "--step", step, json.dumps(arguments)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return f"stopped after {left:.0f} s: no time"
    if run.returncode:
        return ([line for line in run.stderr.splitlines() if line.strip()] or ["failed"])[-1]
    return json.loads(run.stdout.splitlines()[-1])


def run_step(step: str, arguments: list[Any]) -> Any:
    place, *others = arguments
    return STEPS[step](Path(place), *others)


@dataclass
class Clock:
    """Runs steps until the time is up, and keeps their rows by table."""

    place: Path
    shape: Row
    device: str
    end: float
    tables: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))

    def attempt(self, what: str, step: str, *more: str, python: str = sys.executable) -> list[Row]:
        """The step's rows; none if it fails or the time is up, which goes to `left out`."""
        print(f"{what} …", file=sys.stderr)
        arguments = [str(self.place), self.shape, self.device, *more]
        found = in_process(python, step, arguments, self.end - time.monotonic())
        rows = [{"why": found}] if isinstance(found, str) else found
        self.tables["left out"] += [{"step": what} | row for row in rows if "why" in row]
        return [row for row in rows if "why" not in row]

    def measure(self, vllm: str | None) -> None:
        self.tables["dense"] = self.attempt("dense model", "dense")
        models = ["dense"] if self.tables["dense"] else []
        for result in RESULTS if models else ():
            rows = self.attempt(f"convert: {result}", "convert", result)
            self.tables["conversions"] += rows
            models += [result] if rows else []
        self.compare("transformers", "speed", models, sys.executable)
        if vllm or find_spec("vllm"):
            self.compare("vLLM", "vllm", models, vllm or sys.executable)

    def compare(self, runtime: str, step: str, models: list[str], python: str) -> None:
        """Tokens per second of each model, and over the dense model's."""
        dense: dict[int, Row] = {}
        for model in models:
            for row in self.attempt(f"{runtime}: {model}", step, model, python=python):
                beside = dense.setdefault(row["batch"], row) if model == "dense" else None
                beside = beside or dense.get(row["batch"])
                named = {"runtime": runtime, "model": model} | row
                for speed_of in ("prefill", "decode") if beside else ():
                    named[f"{speed_of}, x dense"] = row[speed_of] / beside[speed_of]
                self.tables["speed"].append(named)


def machine(device: str) -> Row:
    import psutil
    import torch

    from upcycle.core.machine import device_name, total_memory

    name = torch.device(device)
    return {
        "device": device_name(name),
        "device_gb": total_memory(name) / 1e9,
        "cores": os.cpu_count(),
        "host_gb": psutil.virtual_memory().total / 1e9,
    }


def commit() -> str | None:
    """None where this is no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def show(tables: dict[str, list[Row]]) -> None:
    from rich.console import Console
    from rich.table import Table

    for title in ("conversions", "speed", "left out"):
        rows = tables.get(title, [])
        if not rows:
            continue
        heads = [head for head in max(rows, key=len) if head != "stages"]
        table = Table(*heads, title=title)
        for row in rows:
            cells = (row.get(head, "") for head in heads)
            table.add_row(*(f"{c:,.2f}" if isinstance(c, float) else str(c) for c in cells))
        Console(width=140).print(table)
    for row in tables.get("conversions", []):
        over = [name for name, most in BOUNDS.items() if row[name] > most]
        verdict = f"over the bound: {', '.join(over)}" if over else "within the bounds"
        print(f"{row['result']}, the whole model: {verdict} {BOUNDS}")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-benchmark"), help="scratch, emptied")
    parser.add_argument("--json", type=Path, help="results")
    parser.add_argument("--vllm", help="Python of an environment with vLLM")
    parser.add_argument("--seconds", type=float, default=470, help="for everything")
    parser.add_argument("--layers", type=int, help="of the model that is measured; else 8")
    parser.add_argument("--tiny", action="store_true", help="try it out on a CPU")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.step:
        print(json.dumps(run_step(args.step[0], json.loads(args.step[1]))))
        return
    import torch

    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU: --tiny tries it out on a CPU")
    from upcycle.core.versions import versions

    shape, device = (TINY, "cpu") if args.tiny else (LARGE, "cuda")
    shape = shape | ({"num_hidden_layers": args.layers} if args.layers else {})
    clock = Clock(args.out, shape, device, time.monotonic() + args.seconds)
    clock.measure(args.vllm)
    shutil.rmtree(args.out, ignore_errors=True)
    report = {
        "command": ["python", "benchmarks/gpu.py", *(sys.argv[1:] if words is None else words)],
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(device),
        "versions": versions(),
        "seeds": [SEED],
        "shape": shape,
        "bounds": BOUNDS,
    }
    if args.json:
        args.json.write_text(json.dumps(report | clock.tables, indent=2))
    show(clock.tables)


if __name__ == "__main__":
    main()
