"""Whether vLLM computes what transformers computes: the same tokens by both.

Both give the log-probability of every token of a text, in windows. vLLM lives in an environment of
its own, because it pins other versions; this script runs itself there.

    python benchmarks/in_vllm.py --python VLLM/bin/python --text TEXT CHECKPOINT [CHECKPOINT …]
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

LogProbs = list[list[float]]
"""Of each window's tokens but the first."""


def by_vllm(folder: str, dtype: str, windows: list[list[int]]) -> LogProbs:
    """In this process, which must be one of vLLM's environment."""
    from vllm import LLM, SamplingParams

    longest = max(map(len, windows))
    model = LLM(folder, dtype=dtype, max_model_len=longest + 1, enforce_eager=True)
    prompts = [{"prompt_token_ids": window} for window in windows]
    score = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = model.generate(prompts, score)
    return [
        [
            seen[token].logprob
            for seen, token in zip(output.prompt_logprobs[1:], window[1:], strict=True)
        ]
        for output, window in zip(outputs, windows, strict=True)
    ]


def by_transformers(folder: Path, dtype: str, windows: list[list[int]]) -> LogProbs:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    found = []
    with torch.inference_mode():
        for window in windows:
            ids_L = torch.tensor(window)
            logits_LV = model(input_ids=ids_L[None], use_cache=False).logits[0].float()
            found.append(logits_LV.log_softmax(-1)[:-1].gather(1, ids_L[1:, None])[:, 0].tolist())
    return found


def compare(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Perplexities by both, and how far apart log-probabilities are, in nats."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(args.text.read_text())["input_ids"]
    windows = [ids[i * args.window : (i + 1) * args.window] for i in range(args.windows)]
    ours = by_transformers(folder, args.dtype, windows)
    row: dict[str, object] = {"checkpoint": folder.name, "transformers": _perplexity(ours)}
    request = json.dumps([str(folder.resolve()), args.dtype, windows])
    inside = [args.python, "-P", __file__, "--inside"]
    environment = {"VLLM_LOGGING_LEVEL": "ERROR"} | os.environ
    run = subprocess.run(inside, input=request, capture_output=True, text=True, env=environment)
    if run.returncode:
        errors = [line for line in run.stderr.splitlines() if "Error" in line]
        return row | {"vLLM": (errors or [f"exit status {run.returncode}"])[-1]}
    theirs: LogProbs = json.loads(run.stdout.splitlines()[-1])
    apart = [
        abs(a - b) for pair in zip(ours, theirs, strict=True) for a, b in zip(*pair, strict=True)
    ]
    return row | {
        "vLLM": _perplexity(theirs),
        "mean apart": math.fsum(apart) / len(apart),
        "most apart": max(apart),
    }


def _perplexity(log_probs: LogProbs) -> float:
    found = [value for window in log_probs for value in window]
    return math.exp(-math.fsum(found) / len(found))


def main() -> None:
    if sys.argv[1:] == ["--inside"]:
        print(json.dumps(by_vllm(*json.load(sys.stdin))))
        return
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--python", required=True, help="of an environment with vLLM")
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
    Console().print(table)


if __name__ == "__main__":
    main()
