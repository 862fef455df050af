"""Tries many more malformed inputs than the tests do, others in every run.

    python benchmarks/fuzz.py --inputs 1000

of each kind: `tests/test_fuzz.py` lists them. An input that fails is printed.
"""

import argparse
import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent / "tests/test_fuzz.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000, help="of each kind")
    parser.add_argument("--kind", default="", help="words of a test's name, as for pytest -k")
    arguments = parser.parse_args()
    os.environ["UPCYCLE_FUZZ_INPUTS"] = str(arguments.inputs)
    raise SystemExit(pytest.main([str(TESTS), "-n", "0", "-k", arguments.kind]))


main()
