#!/usr/bin/env bash
# The forward's speed on this machine's NVIDIA GPU beside PyTorch's cuDNN and FlashAttention-2. Takes
# PyTorch, the installed package, and no network; PYTHON names the interpreter that has them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" scripts/gpu_bench.py "$@"
