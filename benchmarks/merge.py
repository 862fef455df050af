"""A merge of fine-tunes beside the models that it is made of, before and after its routers train.

Fine-tunes the model on each source's text, merges the fine-tunes by every rule for the rest, trains
the routers alone on all texts, and measures the perplexity of everything on every text, beside the
base, each source and the mean of the sources as a dense model. Given mergekit-moe, that makes the
same merge of a file with prompts as upcycle does; of both the seconds and the peak memory of the
whole process are measured. Every row is written as soon as it is there, and what a results file
holds is not measured again; nor is what lies in the scratch folder made again.

    python benchmarks/merge.py --model MODEL --source code=FILE --source prose=FILE \
        --text FILE --text FILE --out SCRATCH [--mergekit .../mergekit-moe] --json RESULTS
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import upcycle
from gpu import commit, machine
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from specialise import train_dense

from upcycle.finetune.settings import load_training

RESTS = ("mean", "ties", "base")
PROMPTS, LONGEST = 5, 200
"""Lines of a source's text that are its prompts in mergekit-moe's file, and their characters."""
Row = dict[str, Any]


def source_folder(args: argparse.Namespace, name: str) -> Path:
    """The model fine-tuned on a source's text."""
    folder: Path = args.out / name
    if not (folder / "model.safetensors").exists():
        length = {"tokens": args.source_tokens, "lr": args.lr, "batch_size": args.batch_size}
        settings = load_training("specialise", length | {"data": args.sources[name]})
        shutil.rmtree(args.out / "draft", ignore_errors=True)
        train_dense(args.model, args.out / "draft", settings)
        (args.out / "draft").rename(folder)
    return folder


def mean_folder(args: argparse.Namespace) -> Path:
    """The mean of the sources, a dense model."""
    folders = [source_folder(args, name) for name in args.sources]
    out: Path = args.out / "mean of sources"
    if not out.exists():
        models = [load_file(folder / "model.safetensors") for folder in folders]
        mean = {
            name: sum(model[name].float() for model in models) / len(models) for name in models[0]
        }
        shutil.copytree(folders[0], out)
        save_file(mean, out / "model.safetensors", {"format": "pt"})
    return out


def merged_folder(args: argparse.Namespace, rest: str) -> Path:
    """A merge with a router fitted to the texts."""
    out: Path = args.out / f"merged {rest}"
    folders = {name: str(source_folder(args, name)) for name in args.sources}
    texts = (w for name in folders for w in ("--text", f"{folders[name]}={args.sources[name]}"))
    if not out.exists():
        upcycle(
            *("merge", *folders.values(), "--base", args.model, "--rest", rest, "-o", str(out)),
            *("--check", "none", "--top-k", str(args.top_k), *texts),
        )
    return out


def trained_folder(args: argparse.Namespace, rest: str) -> Path:
    """The same with its routers trained on all texts."""
    merged, out = merged_folder(args, rest), args.out / f"trained {rest}"
    if not out.exists():
        upcycle(
            *("finetune", str(merged), "-o", str(out), "--recipe", "routers"),
            *("--data", "+".join(args.sources.values()), "--tokens", str(args.router_tokens)),
            *("--batch-size", str(args.batch_size)),
        )
    return Path(out)


def prompts_file(args: argparse.Namespace) -> Path:
    """A file of mergekit-moe: lines from all over each source's text are its prompts."""
    experts = []
    for name, text in args.sources.items():
        lines = [line.strip()[:LONGEST] for line in Path(text).read_text("utf-8").splitlines()]
        long = [line for line in lines if len(line) > LONGEST // 8]
        experts.append(
            {
                "source_model": str(source_folder(args, name)),
                "positive_prompts": long[:: max(1, len(long) // PROMPTS)][:PROMPTS],
            }
        )
    file: Path = args.out / "merge.yml"
    fields = {"base_model": args.model, "gate_mode": "hidden", "dtype": "float32"}
    # JSON is YAML.
    file.write_text(json.dumps(fields | {"experts": experts}, indent=1))
    return file


def timed(command: list[str]) -> Row:
    """Seconds and peak gigabytes of a process."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = process.stderr.read().decode(errors="replace") if process.stderr else ""
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}\n{said}")
    return {"seconds": time.monotonic() - start, "GB": used.ru_maxrss * 1024 / 1e9}


def by_file(args: argparse.Namespace, name: str, *command: str) -> Row:
    """A merge by mergekit-moe's file, made anew."""
    out = args.out / name
    shutil.rmtree(out, ignore_errors=True)
    cost = timed([part.format(file=prompts_file(args), out=out) for part in command])
    return cost | evaluate(args, out)


def evaluate(args: argparse.Namespace, model: str | Path) -> Row:
    """Perplexity, by text."""
    texts = [part for text in args.text for part in ("--text", text)]
    report = upcycle("eval", str(model), "--tokens", str(args.eval_tokens), *texts)
    return {Path(row["text"]).name: row["perplexity"] for row in report["texts"]}


def cells(args: argparse.Namespace) -> dict[str, Callable[[], Row]]:
    """What gives each row."""
    found: dict[str, Callable[[], Row]] = {"base": lambda: evaluate(args, args.model)}
    for name in args.sources:
        found[f"source {name}"] = lambda name=name: evaluate(args, source_folder(args, name))
    found["mean of the sources, dense"] = lambda: evaluate(args, mean_folder(args))
    for rest in args.rests:
        found[f"merge, {rest}"] = lambda rest=rest: evaluate(args, merged_folder(args, rest))
        if rest in args.trained:
            found[f"merge, {rest}, routers trained"] = lambda rest=rest: evaluate(
                args, trained_folder(args, rest)
            )
    ours = (sys.executable, "-m", "upcycle", "merge", "{file}", "-o", "{out}", "--check", "none")
    found["upcycle, mergekit-moe's file"] = lambda: by_file(args, "by file", *ours)
    if args.mergekit and Path(args.mergekit).exists():
        theirs = (args.mergekit, "{file}", "{out}")
        found["mergekit-moe"] = lambda: by_file(args, "by mergekit", *theirs)
    else:
        print("mergekit-moe is left out: --mergekit names no program", file=sys.stderr)
    return found


def about(args: argparse.Namespace) -> dict[str, Any]:
    """How the rows came about."""
    places = {str(Path(word.partition("=")[2] or word).parent) for word in sys.argv if "/" in word}
    command = " ".join(["python benchmarks/merge.py", *sys.argv[1:]])
    for place in sorted(places, key=len, reverse=True):
        command = command.replace(f"{place}/", "")
    return {
        "command": [command],
        "commit": commit(),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": machine("cpu"),
        "seeds": [0],
    }


def show(rows: dict[str, Row]) -> None:
    names = list(dict.fromkeys(key for row in rows.values() for key in row))
    table = Table("", *names, title="perplexity, by text")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.2f}" if key in row else "" for key in names))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the base, a folder")
    parser.add_argument("--source", action="append", required=True, metavar="NAME=TEXT")
    parser.add_argument("--text", action="append", required=True, help="to measure on; repeatable")
    parser.add_argument("--source-tokens", type=int, default=65_536)
    parser.add_argument("--router-tokens", type=int, default=65_536)
    parser.add_argument("--eval-tokens", type=int, default=4096)
    parser.add_argument("--rests", nargs="*", default=list(RESTS))
    parser.add_argument("--trained", nargs="*", default=list(RESTS), help="of these, the routers")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--mergekit", help="the program mergekit-moe, of an environment of its own")
    parser.add_argument("--out", type=Path, required=True, help="scratch, which is kept")
    parser.add_argument(
        "--json", type=Path, required=True, help="results, and what is done of them"
    )
    args = parser.parse_args()

    args.sources = dict(word.split("=", 1) for word in args.source)
    args.out.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.json.read_text()) if args.json.exists() else {"rows": {}}
    rows: dict[str, Row] = results["rows"]
    for name, measure in cells(args).items():
        if name in rows:
            continue
        rows[name] = measure()
        print(json.dumps({name: rows[name]}), file=sys.stderr, flush=True)
        args.json.write_text(json.dumps(about(args) | {"rows": rows}, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
