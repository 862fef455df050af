"""Whether another runtime computes what transformers computes: the same tokens by both.

Both give the log-probability of every token of a text, in windows. The runtime lives in an
environment of its own, because it may pin other versions; this script runs itself there. llama.cpp
is reached through the package llama-cpp-python, after its own script (--converter) has made a GGUF
file in float32; vLLM's `transformers` is its backend that runs transformers' classes.

    python benchmarks/in_runtime.py vllm --python VLLM/bin/python --text TEXT CHECKPOINT …
"""

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Windows = list[list[int]]
LogProbs = list[list[float]]
"""Of each window's tokens but the first."""


def by_vllm(folder: str, request: dict[str, Any], model_impl: str = "vllm") -> LogProbs:
    """In this process, which must be one of vLLM's environment; so below."""
    from vllm import LLM, SamplingParams

    windows: Windows = request["windows"]
    longest = max(map(len, windows))
    model = LLM(
        folder,
        dtype=request["dtype"],
        max_model_len=longest + 1,
        enforce_eager=True,
        model_impl=model_impl,
    )
    prompts = [{"prompt_token_ids": window} for window in windows]
    outputs = model.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0))
    return [
        [
            seen[token].logprob
            for seen, token in zip(output.prompt_logprobs[1:], window[1:], strict=True)
        ]
        for output, window in zip(outputs, windows, strict=True)
    ]


def by_vllm_transformers(folder: str, request: dict[str, Any]) -> LogProbs:
    return by_vllm(folder, request, "transformers")


def by_mlx(folder: str, request: dict[str, Any]) -> LogProbs:
    import mlx.core as mx
    from mlx_lm import load

    model, _ = load(folder)
    model.set_dtype(getattr(mx, request["dtype"]))
    found = []
    for window in request["windows"]:
        logits_LV = model(mx.array([window]))[0].astype(mx.float32)
        found.append(_picked(logits_LV - mx.logsumexp(logits_LV, axis=-1, keepdims=True), window))
    return found


def by_llama_cpp(folder: str, request: dict[str, Any]) -> LogProbs:
    import numpy as np

    libraries = os.environ.get("LLAMA_CPP_LIB_PATH")
    if libraries:  # builds that come without one for this processor load theirs when told where
        ggml = ctypes.CDLL(f"{libraries}/libggml.so", mode=ctypes.RTLD_GLOBAL)
        ggml.ggml_backend_load_all_from_path(libraries.encode())
    from llama_cpp import Llama

    longest = max(map(len, request["windows"]))
    with tempfile.TemporaryDirectory() as scratch:
        gguf = Path(scratch) / "model.gguf"
        command = [sys.executable, request["converter"], folder]
        made = subprocess.run(
            [*command, "--outfile", gguf, "--outtype", "f32"], capture_output=True, text=True
        )
        if made.returncode:
            raise SystemExit(made.stderr)
        model = Llama(
            str(gguf),
            n_ctx=longest,
            n_batch=longest,
            n_ubatch=longest,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            type_k=0,  # keys and values in float32
            type_v=0,
            flash_attn=False,
            verbose=False,
        )
        found = []
        for window in request["windows"]:
            model.reset()
            model.eval(window)
            logits_LV = np.array(model.scores[: len(window)], dtype=np.float64)
            logits_LV -= logits_LV.max(-1, keepdims=True)
            found.append(
                _picked(logits_LV - np.log(np.exp(logits_LV).sum(-1, keepdims=True)), window)
            )
    return found


def by_transformers(folder: str, request: dict[str, Any]) -> LogProbs:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=request["dtype"]).eval()
    found = []
    with torch.inference_mode():
        for window in request["windows"]:
            logits = model(input_ids=torch.tensor([window]), use_cache=False).logits[0].float()
            found.append(_picked(logits.log_softmax(-1), window))
    return found


def _picked(log_probs_LV: Any, window: list[int]) -> list[float]:
    """Of each next token."""
    return [float(log_probs_LV[i, token]) for i, token in enumerate(window[1:])]


RUNTIMES = {
    "vllm": by_vllm,
    "vllm-transformers": by_vllm_transformers,
    "llama.cpp": by_llama_cpp,
    "mlx": by_mlx,
    "transformers": by_transformers,  # of another version
}


def compare(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Perplexities by both, and how far apart log-probabilities are, in nats."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(args.text.read_text())["input_ids"]
    windows = [ids[i * args.window : (i + 1) * args.window] for i in range(args.windows)]
    request = {"windows": windows, "dtype": args.dtype, "converter": args.converter}
    ours = by_transformers(str(folder), request)
    architecture = json.loads((folder / "config.json").read_text())["model_type"]
    row: dict[str, object] = {"checkpoint": folder.name, "architecture": architecture}
    row["transformers"] = _perplexity(ours)
    inside = [args.python, "-P", __file__, args.runtime, "--inside", folder.resolve()]
    environment = {"VLLM_LOGGING_LEVEL": "ERROR"} | os.environ
    run = subprocess.run(
        inside, input=json.dumps(request), capture_output=True, text=True, env=environment
    )
    if run.returncode:
        errors = [line for line in run.stderr.splitlines() if "Error" in line or "error" in line]
        return row | {args.runtime: (errors or [f"exit status {run.returncode}"])[-1]}
    theirs: LogProbs = json.loads(run.stdout.splitlines()[-1])
    apart = [
        abs(a - b) for pair in zip(ours, theirs, strict=True) for a, b in zip(*pair, strict=True)
    ]
    return row | {
        args.runtime: _perplexity(theirs),
        "mean apart": math.fsum(apart) / len(apart),
        "most apart": max(apart),
    }


def _perplexity(log_probs: LogProbs) -> float:
    found = [value for window in log_probs for value in window]
    return math.exp(-math.fsum(found) / len(found))


def main() -> None:
    if sys.argv[2:3] == ["--inside"]:
        print(json.dumps(RUNTIMES[sys.argv[1]](sys.argv[3], json.load(sys.stdin))))
        return
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--python", required=True, help="of an environment with the runtime")
    parser.add_argument("--converter", help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="results")
    args = parser.parse_args()

    rows = [compare(args, folder) for folder in args.checkpoints]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))
    table = Table(*max(rows, key=len))
    for row in rows:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
