"""Every command that writes, killed at random moments; tests/test_kills.py runs a handful,
benchmarks/kill.py as many as you like.

Each command runs once undisturbed and then many times killed (SIGKILL) after a random time, again
and again until it ends by itself; convert and finetune go on with --resume. The result must have
the bytes of the undisturbed run, and nothing may lie beside it; after every kill, what is there
must be whole, the former result or the new one.
"""

import json
import shutil
import time
from functools import partial

from processes import killed
from tiny import make_dense
from typer.testing import CliRunner

from upcycle.cli import app

MOST_KILLS = 3  # of a try, after which the command may end
TIMES = {"seconds", "peak_memory", "tokens_per_second"}
"""What differs from run to run."""
SPLIT = """
    --experts 8 --top-k 2 --calibration builtin --calibration-tokens 128 --seq-len 64
    --set max_shard_size=100KB --check none
""".split()
TRAINING = """
    --steps 4 --seq-len 32 --batch-size 2 --distill 0 --set validation_tokens=64
    --set validate_every=2
""".split()
EVALUATION = "--tokens 64 --seq-len 64".split()


def commands(folder):
    """The command line's arguments, and what they write, by name."""
    dense, moe, text = make_dense(folder / "dense"), folder / "moe", folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    run(["convert", str(dense), "-o", str(moe), *SPLIT])
    made = {
        "convert": (["convert", str(dense), *SPLIT, "-o"], "out"),
        "finetune": (["finetune", str(moe), "--data", str(text), *TRAINING, "-o"], "out"),
        "eval": (["eval", str(moe), "--text", str(text), *EVALUATION, "--output"], "eval.json"),
    }
    places = {name: folder / name / file for name, (_, file) in made.items()}
    return {name: ([*made[name][0], str(place)], place) for name, place in places.items()}


def try_often(command, result, tries, rng):
    """Let a command be killed and go on, many times over; how often it was killed.

    Raises:
        AssertionError: what it leaves is not what it leaves when it is not killed.
    """
    result.parent.mkdir()
    start = time.monotonic()
    run(command)
    longest, expected, kills = time.monotonic() - start, content(result), 0
    for number in range(tries):
        clear(result)
        former = number % 2 == 1 and command[0] != "eval"
        if former:
            run([*command, "--seed", "1"])
        again = [] if command[0] == "eval" else ["--resume"] + ["--overwrite"] * former
        before = content(result) if former else None
        for _ in range(rng.randint(1, MOST_KILLS)):
            kills += killed(partial(run, [*command, *again]), after=rng.uniform(0, longest))
            left = content(result) if result.exists() else None
            assert left in (before, expected), f"a kill left a part of a result: {command}"
        run([*command, *again])
        assert content(result) == expected, f"other bytes after kills: {command}"
        assert [path.name for path in result.parent.iterdir()] == [result.name]
    return kills


def run(command):
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, (command, done.output)


def clear(result):
    shutil.rmtree(result.parent)
    result.parent.mkdir()


def content(result):
    """The bytes of every file; of records, all but times."""
    files = [path for path in result.rglob("*") if path.is_file()] or [result]
    return {str(path.relative_to(result)): _content(path) for path in files}


def _content(path):
    text = path.read_bytes()
    if path.suffix not in (".json", ".jsonl"):
        return text
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [_lasting(json.loads(line)) for line in lines]


def _lasting(value):
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if key not in TIMES}
    return [_lasting(item) for item in value] if isinstance(value, list) else value
