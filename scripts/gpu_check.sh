#!/usr/bin/env bash
# Everything there is to check on a machine with an NVIDIA GPU: the accuracy suite on each
# implementation, compute-sanitizer on a sample of it, the benchmark. Takes PyTorch, pytest and the
# installed package, and no network; PYTHON names the interpreter that has them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

echo "== accuracy"
"$python" -m pytest -q tests/python/test_cuda.py

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer, $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q \
      tests/python/test_cuda.py -k "any_lengths and 200-113 or rows_behind or pages and 17"
  done
else
  echo "== compute-sanitizer is not on the path: skipped"
fi

echo "== benchmark"
scripts/gpu_bench.sh --quick
