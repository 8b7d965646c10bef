#!/usr/bin/env bash
# Every test: style, the C++ tests, those again under sanitizers and for 64-bit Arm, and the Python
# tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
source scripts/common.sh
mkdir -p build

say "format"
scripts/check_format.sh

say "arrows between the rooms"
.venv/bin/python scripts/check_arrows.py

say "C++ tests"
configure_and_build build/cpp
ctest --test-dir build/cpp --output-on-failure --parallel "$CMAKE_BUILD_PARALLEL_LEVEL"

say "C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
# -O1: instrumented vector code takes more than twice as long to compile at -O2.
configure_and_build build/asan "" -DFA_SANITIZE=address,undefined -DFA_BUILD_TOOLS=OFF \
  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O1
ctest --test-dir build/asan --output-on-failure --parallel "$CMAKE_BUILD_PARALLEL_LEVEL"

say "C++ tests for 64-bit Arm, emulated"
if [[ $(uname -m) != aarch64 ]]; then
  configure_and_build build/aarch64 "" --toolchain cmake/aarch64-linux-gnu.cmake \
    -DFA_BUILD_TOOLS=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1
  ctest --test-dir build/aarch64 --output-on-failure --parallel "$CMAKE_BUILD_PARALLEL_LEVEL"
fi

say "Python tests"
# A file is one process', for what its tests share; each process computes with all processors, too.
processes=$((CMAKE_BUILD_PARALLEL_LEVEL < 4 ? CMAKE_BUILD_PARALLEL_LEVEL : 4))
.venv/bin/python -m pytest -q --numprocesses "$processes" --dist loadfile --no-loadscope-reorder
