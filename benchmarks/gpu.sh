#!/usr/bin/env bash
# What a conversion of an 8B costs on a GPU, and how fast its results are: in at most eight minutes.
#
#     bash benchmarks/gpu.sh [--out SCRATCH] [--json FILE]     # --tiny tries it out on a CPU
#
# PYTHON names the interpreter; where upcycle is not installed in it, it is installed first.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import torch, upcycle' 2> /dev/null || "$python" -m pip install --quiet -e .
exec timeout --kill-after 10 480 "$python" benchmarks/gpu.py "$@"
