"""The command line, for benchmarks."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measured:
    """One command's JSON, and what it took."""

    report: dict[str, Any]
    cpu_seconds: float
    """Of all its threads, which other work beside does not lengthen much."""
    peak_bytes: int


def upcycle(*arguments: str) -> dict[str, Any]:
    """One command's JSON."""
    return measured(*arguments).report


def measured(*arguments: str) -> Measured:
    """One command, run in a process of its own."""
    command = [sys.executable, "-m", "upcycle", *arguments, "--json"]
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=printed, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        said.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\n{said.read()}")
        return Measured(
            json.loads(printed.read()), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
        )
