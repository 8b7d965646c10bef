"""The checks of the repository catch what they are there to catch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_module

MAX_WHEEL_BYTES = 5_000_000


def run_check(root, tree):
    return subprocess.run(
        [sys.executable, str(root / "scripts" / "check_arrows.py"), str(tree)],
        capture_output=True,
        text=True,
    )


def test_the_tree_obeys_the_arrows(root):
    result = run_check(root, root)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "path,include",
    [
        ("src/core/problem.h", '"cpu/cpu.h"'),
        ("src/core/validate.cc", "<hwy/highway.h>"),
        ("src/core/validate.cc", "<unistd.h>"),
        ("src/core/semantics.h", "<cstdint>"),
        ("src/core/registry.cc", '"flash_attn/flash_attn.h"'),
        ("src/reference/reference.cc", '"cpu/cpu.h"'),
        ("src/cpu/forward.cc", '"reference/reference.h"'),
        ("src/cpu/forward.cc", '"flash_attn/flash_attn.h"'),
        ("src/cpu/inner/kernel.h", '"../../reference/reference.h"'),
        ("src/cuda/launch.cc", '"cpu/parallel.h"'),
        ("src/cuda/device/forward.cu", "<cstdint>"),
        ("src/api/c_api.cc", "<tvm/ffi/function.h>"),
        ("src/bindings/module.cc", '"core/problem.h"'),
        ("src/bindings/module.cc", "<torch/torch.h>"),
        ("src/bindings/module.cc", "<Python.h>"),
        ("include/flash_attn/attention.hpp", '"core/problem.h"'),
        ("tools/info.cc", '"cpu/cpu.h"'),
        ("examples/quick_start.cc", '"core/problem.h"'),
        ("src/elsewhere/file.cc", "<vector>"),
    ],
)
def test_an_include_against_the_arrows_is_caught(root, tmp_path, path, include):
    reference = tmp_path / "src" / "reference" / "reference.h"
    reference.parent.mkdir(parents=True)
    reference.write_text("#pragma once\n")
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#include {include}\n")
    result = run_check(root, tmp_path)
    assert result.returncode == 1
    assert path in result.stdout


def test_allowed_includes_are_allowed(root, tmp_path):
    allowed = {
        "src/core/registry.cc": ['"cpu/cpu.h"', '"reference/reference.h"', "<vector>"],
        "src/cpu/forward.cc": ['"core/problem.h"', "<hwy/highway.h>", "<dlfcn.h>"],
        "src/api/c_api.cc": ['"core/dispatch.h"', '"flash_attn/flash_attn.h"'],
        "src/bindings/module.cc": ["<flash_attn/flash_attn.h>", "<tvm/ffi/function.h>"],
        "src/cuda/device/forward.cu": ['"core/semantics.h"', '"cuda/device/tile.h"'],
    }
    for path, includes in allowed.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"#include {include}\n" for include in includes))
    result = run_check(root, tmp_path)
    assert result.returncode == 0, result.stdout


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc"
)


@needs_proc
def test_memory_of_training_grows_linearly(root):
    """The bar is 600 MB at 65,536 tokens, which takes a minute; this is a quarter of both."""
    script = str(root / "scripts" / "check_memory.py")
    result = subprocess.run(
        [sys.executable, script, "--seqlen", "16384"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@needs_proc
def test_a_stored_matrix_of_scores_is_caught(root):
    code = """
import sys, torch
import check_memory
def stored(q, k, v):
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
check_memory.flash_attn_func = stored
sys.exit(check_memory.main())
"""
    result = subprocess.run(
        [sys.executable, "-c", code, "--seqlen", "2048"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "scripts"), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "the bound is 18.8 MB" in result.stdout, result.stderr


def test_every_room_has_a_rule(root):
    check = load_module(root / "scripts" / "check_arrows.py")
    for room in ("core", "reference", "cpu", "cuda", "api", "bindings"):
        assert check.rule_for(f"src/{room}/file.cc") is not None


def test_the_wheel_is_small_and_serves_every_python(root):
    wheels = list((root / "dist").glob("*.whl"))
    if not wheels:
        pytest.skip("no wheel in dist/")
    for wheel in wheels:
        assert wheel.stat().st_size < MAX_WHEEL_BYTES
        assert "-py3-none-" in wheel.name
