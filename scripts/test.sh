#!/usr/bin/env bash
# Every test: style, the C++ tests, those again under sanitizers, and the Python tests.
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
ctest --test-dir build/cpp --output-on-failure

say "C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
configure_and_build build/asan "" -DFA_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DFA_BUILD_TOOLS=OFF
ctest --test-dir build/asan --output-on-failure

say "Python tests"
.venv/bin/python -m pytest -q
