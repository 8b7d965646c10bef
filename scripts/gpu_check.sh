#!/usr/bin/env bash
# Everything there is to check on a machine with an NVIDIA GPU: the accuracy suite on each
# implementation, compute-sanitizer on a sample of it, the benchmark. Takes PyTorch, pytest and the
# installed package, and no network; PYTHON names the interpreter that has them, and PROCESSES how
# many share the suite.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# Each has a context and tensors of its own on the GPU.
processes=${PROCESSES:-$("$python" -c '
import os, torch
memory = torch.cuda.get_device_properties(0).total_memory
print(max(1, min(os.cpu_count(), 16, memory // 2**31)))')}

pids=()
# start NAME COMMAND...: in the background, its output in a file.
start() {
  "${@:2}" >"$logs/$1" 2>&1 &
  pids+=("$!")
}
# Waits for all, and shows how each has ended: its last line, or of those that failed all.
finish() {
  local failed=0 name names=("$@")
  for i in "${!pids[@]}"; do
    name=${names[$i]}
    if wait "${pids[$i]}"; then
      echo "$name: $(tail -n 1 "$logs/$name")"
    else
      echo "$name: failed"
      cat "$logs/$name"
      failed=1
    fi
  done
  pids=()
  return "$failed"
}

echo "== accuracy, by $processes processes"
names=()
for ((i = 1; i <= processes; ++i)); do
  names+=("part $i")
  start "part $i" "$python" -m pytest -q --shard "$i/$processes" tests/python/test_cuda.py
done
names+=("KV caches")
start "KV caches" "$python" -m pytest -q --device cuda tests/python/test_kvcache.py
finish "${names[@]}"

if command -v compute-sanitizer >/dev/null; then
  echo "== compute-sanitizer"
  sample="any_lengths and 200-113 or rows_behind or pages and 17 or pages_of and 256-16"
  sample+=" or a_bias_may and odd_gaps or varlen_dropout"
  for tool in memcheck racecheck; do
    start "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q \
      tests/python/test_cuda.py -k "$sample"
  done
  finish memcheck racecheck
else
  echo "== compute-sanitizer is not on the path: skipped"
fi

echo "== benchmark"
scripts/gpu_bench.sh --quick
