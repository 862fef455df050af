"""The command line, for benchmarks."""

import json
import subprocess
import sys
from typing import Any


def upcycle(*arguments: str) -> dict[str, Any]:
    """One command's JSON."""
    command = [sys.executable, "-m", "upcycle", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report
