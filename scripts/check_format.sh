#!/usr/bin/env bash
# clang-format over the C++ files, ruff over the Python ones. --fix rewrites what is not as it should be.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tool() { [[ -x .venv/bin/$1 ]] && echo ".venv/bin/$1" || echo "$1"; }

files() { git ls-files --cached --others --exclude-standard -- "$@"; }

clang_format=(--dry-run -Werror)
ruff_check=()
ruff_format=(--check)
if [[ ${1:-} == --fix ]]; then
  clang_format=(-i)
  ruff_check=(--fix)
  ruff_format=()
fi
files '*.c' '*.cc' '*.h' '*.hpp' '*.cu' '*.cuh' | xargs -r "$(tool clang-format)" "${clang_format[@]}"
files '*.py' | xargs -r "$(tool ruff)" check --quiet "${ruff_check[@]}"
files '*.py' | xargs -r "$(tool ruff)" format --quiet "${ruff_format[@]}"
