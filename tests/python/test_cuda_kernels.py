"""Every kernel for NVIDIA GPUs compiles, on a machine without one: NVRTC comes from PyPI.

A kernel is compiled for one of the architectures, those that models spend their time in for each.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

COMPUTE_CAPABILITIES = [80, 90, 100, 120]
# Kernels that a device can be asked for, by its compute capability.
REACHABLE = {80: 135, 90: 135, 100: 135, 120: 135}
# The two sums per 16 rows that a warp keeps between steps; more is a spill that costs.
ALLOWED_SPILL = 96
LINE = re.compile(r"^(\S+): (.*): (\d+) registers, (\d+) bytes spilled(.*)$")


def nvrtc() -> Path | None:
    for entry in sys.path:
        for path in Path(entry, "nvidia").glob("*/lib/libnvrtc.so.1?"):
            return path
    return None


pytestmark = pytest.mark.skipif(nvrtc() is None, reason="nvidia-cuda-nvrtc is not installed")


def is_hot(kernel: str) -> bool:
    """Without options that cost more than a spill would."""
    return "forward_fp32" not in kernel and not re.search("general|paged|s_dmask", kernel)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels") / "cache"


def command(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = os.environ.get("FLASH_ATTN_PLUS") or Path(sys.executable).with_name("flash-attn-plus")
    environment = os.environ | {
        "FLASH_ATTENTION_NVRTC": str(nvrtc()),
        "FLASH_ATTENTION_CACHE_DIR": str(cache),
    }
    return subprocess.run(
        [str(program), "cache", *arguments], env=environment, capture_output=True, text=True
    )


def kernels(cache: Path, compute_capability: int) -> list[str]:
    result = command(cache, "--precompile", str(compute_capability), "--list")
    assert result.returncode == 0, result.stderr
    return [line.split(": ", 1)[1] for line in result.stdout.splitlines()]


@pytest.mark.parametrize("compute_capability", COMPUTE_CAPABILITIES)
def test_the_number_of_reachable_kernels(cache, compute_capability):
    listed = kernels(cache, compute_capability)
    assert len(listed) == len(set(listed)) == REACHABLE[compute_capability]


@pytest.fixture(scope="module")
def reports(cache: Path) -> dict[tuple[str, str], tuple[int, str]]:
    """(arch, kernel) to (bytes spilled, what else ptxas complains of)."""

    def compile_some(compute_capability: int) -> subprocess.CompletedProcess[str]:
        turn = COMPUTE_CAPABILITIES.index(compute_capability)
        wanted = [
            kernel
            for index, kernel in enumerate(kernels(cache, compute_capability))
            if index % len(COMPUTE_CAPABILITIES) == turn
            or (is_hot(kernel) and "bfloat16" in kernel)
        ]
        text = "|".join(wanted)
        return command(cache, "--precompile", str(compute_capability), "--filter", text)

    found = {}
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(compile_some, COMPUTE_CAPABILITIES):
            assert result.returncode == 0, result.stderr
            for line in result.stdout.splitlines():
                arch, kernel, _, spilled, rest = LINE.match(line).groups()
                found[arch, kernel] = (int(spilled), rest)
    return found


def test_every_kernel_compiles(cache, reports):
    compiled = {kernel for _, kernel in reports}
    for compute_capability in COMPUTE_CAPABILITIES:
        missing = [
            kernel
            for kernel in kernels(cache, compute_capability)
            if kernel not in compiled and compute_capability == 90
        ]
        assert not missing


def test_no_hot_kernel_spills(reports):
    spilled = {key: it[0] for key, it in reports.items() if is_hot(key[1])}
    assert len(spilled) > 50
    assert {key: n for key, n in spilled.items() if n > ALLOWED_SPILL} == {}


def test_no_wgmma_is_serialised(reports):
    assert {key: it[1] for key, it in reports.items() if it[1]} == {}


def test_the_cache_holds_what_was_compiled(cache, reports):
    shown = command(cache).stdout
    assert str(cache) in shown and f"{len(reports)} kernels" in shown
    assert cache.stat().st_mode & 0o777 == 0o700
    assert all(entry.stat().st_mode & 0o777 == 0o600 for entry in cache.iterdir())
    assert command(cache, "--clear").returncode == 0
    assert list(cache.iterdir()) == []


def test_a_missing_nvrtc_is_named(tmp_path, monkeypatch):
    environment = os.environ | {"FLASH_ATTENTION_NVRTC": "/nowhere/libnvrtc.so"}
    program = os.environ.get("FLASH_ATTN_PLUS") or Path(sys.executable).with_name("flash-attn-plus")
    result = subprocess.run(
        [str(program), "cache", "--precompile", "90"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "/nowhere/libnvrtc.so" in result.stderr
