#!/usr/bin/env bash
# The tour, in five steps: this machine, the quick example, C++ alone, a real model on real sentences,
# and that model trained.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
source scripts/common.sh
export HF_HUB_OFFLINE=1

say "1/5  this machine"
.venv/bin/flash-attn-plus info

say "2/5  the quick example, from Python"
.venv/bin/python examples/quick_start.py

say "3/5  the quick example, from C++"
mkdir -p build
configure_and_build build/cpp quick_start
build/cpp/examples/quick_start

say "4/5  sentence embeddings with all-MiniLM-L6-v2"
.venv/bin/python examples/sentence_embeddings.py

say "5/5  the same model, fine-tuned for a few steps"
.venv/bin/python examples/finetune_embeddings.py
