"""Kills every command that writes, at random moments, and compares what comes of it.

convert, finetune and eval --output run on tiny random models; tests/kills.py says how.

    python benchmarks/kill.py --tries 200 --seed 0
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main() -> None:
    from kills import commands, try_often

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=50, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="upcycle-kill-") as folder:
        for name, (command, result) in commands(Path(folder)).items():
            kills = try_often(command, result, args.tries, random.Random(args.seed))
            print(f"{name}: {args.tries} results after {kills} kills, all with the same bytes")


if __name__ == "__main__":
    main()
