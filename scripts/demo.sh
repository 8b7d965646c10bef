#!/usr/bin/env bash
# The tour, in four steps: this machine, the quick example, C++ alone, a real model on real sentences.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
source scripts/common.sh
export HF_HUB_OFFLINE=1

say "1/4  this machine"
.venv/bin/flash-attn-plus info

say "2/4  the quick example, from Python"
.venv/bin/python examples/quick_start.py

say "3/4  the quick example, from C++"
mkdir -p build
configure_and_build build/cpp quick_start
build/cpp/examples/quick_start

say "4/4  sentence embeddings with all-MiniLM-L6-v2"
.venv/bin/python examples/sentence_embeddings.py
