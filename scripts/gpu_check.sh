#!/usr/bin/env bash
# Everything there is to check on a machine with an NVIDIA GPU: the accuracy suite on each
# implementation, compute-sanitizer on a sample of it, the benchmark. Takes PyTorch, pytest,
# pytest-xdist and the installed package, and no network; PYTHON names the interpreter that has
# them, and PROCESSES how many share the suite.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

# Each has a context and tensors of its own on the GPU.
processes=${PROCESSES:-$("$python" -c '
import os, torch
memory = torch.cuda.get_device_properties(0).total_memory
print(max(1, min(os.cpu_count(), 16, memory // 2**31)))')}

echo "== accuracy, by $processes processes"
shared=(-m pytest -q --numprocesses "$processes" --dist worksteal)
"$python" "${shared[@]}" tests/python/test_cuda.py
"$python" "${shared[@]}" --device cuda tests/python/test_kvcache.py

if command -v compute-sanitizer >/dev/null; then
  sample="any_lengths and 200-113 or rows_behind or pages and 17 or pages_of and 256-16"
  sample+=" or a_bias_may and odd_gaps or varlen_dropout"
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer, $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q \
      tests/python/test_cuda.py -k "$sample"
  done
else
  echo "== compute-sanitizer is not on the path: skipped"
fi

echo "== benchmark"
scripts/gpu_bench.sh --quick
