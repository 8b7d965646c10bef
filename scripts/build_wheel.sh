#!/usr/bin/env bash
# Builds the wheel into dist/, from build/python, which is kept so that only what changed is compiled;
# and beside it the wheel of packaging/flash-attn, which gives the library its second name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
source scripts/common.sh

rm -rf dist
mkdir -p build
.venv/bin/python -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation \
  --config-settings=build-dir=build/python --wheel-dir dist . >build/wheel.log 2>&1 ||
  { tail -n 100 build/wheel.log; fail "building the wheel"; }
.venv/bin/python -m pip wheel -qq --disable-pip-version-check --no-deps --no-build-isolation \
  --wheel-dir dist ./packaging/flash-attn
ls -l dist/*.whl | awk '{printf "%s: %.2f MB\n", $NF, $5 / 1e6}'
