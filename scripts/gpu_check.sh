#!/usr/bin/env bash
# Everything there is to check on a machine with an NVIDIA GPU: the accuracy suite on each
# implementation, compute-sanitizer on a sample of it, the benchmark. All of it runs, whatever fails
# on the way; then the script fails, too. Takes PyTorch, pytest, pytest-xdist and the installed
# package, and no network; PYTHON names the interpreter that has them, and PROCESSES how many share
# the suite.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=${PYTHON:-python3}

# Each has a context and tensors of its own on the GPU.
processes=${PROCESSES:-$("$python" -c '
import os, torch
memory = torch.cuda.get_device_properties(0).total_memory
print(max(1, min(os.cpu_count(), 16, memory // 2**31)))')} || exit

echo "== accuracy, by $processes processes"
shared=(-m pytest -q --numprocesses "$processes" --dist worksteal)
failed=()
"$python" "${shared[@]}" tests/python/test_cuda.py tests/python/test_cuda_layouts.py ||
  failed+=(test_cuda)
"$python" "${shared[@]}" tests/python/test_known_calls_cuda.py || failed+=(test_known_calls)
"$python" "${shared[@]}" --device cuda tests/python/test_kvcache.py || failed+=(test_kvcache)

if command -v compute-sanitizer >/dev/null; then
  sample="any_lengths and 200-113 or rows_behind or pages and 17 or pages_of and 256-16"
  sample+=" or a_bias_may and odd_gaps or varlen_dropout or many_sequences and 24"
  sample+=" or unlike and 128-64 or many_causal and 128-8"
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer, $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q \
      tests/python/test_cuda.py tests/python/test_cuda_layouts.py -k "$sample" ||
      failed+=("$tool")
  done
else
  echo "== compute-sanitizer is not on the path: skipped"
fi

echo "== benchmark"
scripts/gpu_bench.sh --quick || failed+=(gpu_bench)

echo "== failed: ${failed[*]:-nothing}"
exit $((${#failed[@]} > 0))
