"""Every kernel for NVIDIA GPUs compiles, on a machine without one: NVRTC comes from PyPI.

A kernel is compiled for one of the architectures, those that models spend their time in for each.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import flash_attn

COMPUTE_CAPABILITIES = [75, 80, 90, 100, 120]
# Kernels that a device can be asked for, by its compute capability.
REACHABLE = {75: 110, 80: 211, 90: 281, 100: 211, 120: 211}
# Bytes: the two sums per 16 rows that a warp keeps between steps; more is a spill that costs.
ALLOWED_SPILL = 96
# What the threads of Hopper that find tiles and load pages, with 32 registers, keep: once a tile.
ALLOWED_SPILL_PAGED = 112
LINE = re.compile(r"^(\S+): (.*): (\d+) registers, (\d+) bytes spilled(.*)$")


def nvrtc() -> Path | None:
    for entry in sys.path:
        for path in Path(entry, "nvidia").glob("*/lib/libnvrtc.so.1?"):
            return path
    return None


pytestmark = pytest.mark.skipif(nvrtc() is None, reason="nvidia-cuda-nvrtc is not installed")


def is_hot(kernel: str) -> bool:
    """Without options that cost more than a spill would."""
    if "forward_sm90" in kernel:
        return "dropout" not in kernel
    if "packed" in kernel:  # of decoding, where pages are usual
        return "general" not in kernel
    return not re.search("forward_fp32|general|paged|s_dmask|update_cache|combine_splits", kernel)


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
def selection(cache: Path) -> dict[int, list[str]]:
    """What to compile for each compute capability; all of them together cover every kernel."""
    listed = {cc: kernels(cache, cc) for cc in COMPUTE_CAPABILITIES}
    chosen = {
        cc: [kernel for kernel in list_of if is_hot(kernel) and (cc == 75 or "bfloat16" in kernel)]
        for cc, list_of in listed.items()
    }
    done = {kernel for list_of in chosen.values() for kernel in list_of}
    everything = dict.fromkeys(kernel for list_of in listed.values() for kernel in list_of)
    for turn, kernel in enumerate(kernel for kernel in everything if kernel not in done):
        takers = [cc for cc in COMPUTE_CAPABILITIES if kernel in listed[cc]]
        chosen[takers[turn % len(takers)]].append(kernel)
    return chosen


@pytest.fixture(scope="module")
def reports(cache: Path, selection: dict[int, list[str]]) -> dict[tuple[str, str], tuple[int, str]]:
    """(arch, kernel) to (bytes spilled, what else ptxas complains of)."""

    def compile_some(cc: int) -> subprocess.CompletedProcess[str]:
        return command(cache, "--precompile", str(cc), "--filter", "|".join(selection[cc]))

    found = {}
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(compile_some, COMPUTE_CAPABILITIES):
            assert result.returncode == 0, result.stderr
            for line in result.stdout.splitlines():
                arch, kernel, _, spilled, rest = LINE.match(line).groups()
                found[arch, kernel] = (int(spilled), rest)
    return found


def test_every_kernel_compiles(selection, reports):
    assert len(reports) >= sum(map(len, selection.values()))
    compiled = {kernel for _, kernel in reports}
    assert compiled >= {kernel for list_of in selection.values() for kernel in list_of}


def allowed_spill(kernel: str) -> int:
    paged_on_hopper = "forward_sm90" in kernel and "paged" in kernel
    return ALLOWED_SPILL_PAGED if paged_on_hopper else ALLOWED_SPILL


def test_no_hot_kernel_spills(reports):
    spilled = {key: it[0] for key, it in reports.items() if is_hot(key[1])}
    assert len(spilled) > 50
    assert {key: n for key, n in spilled.items() if n > allowed_spill(key[1])} == {}


def test_no_wgmma_is_serialised(reports):
    assert {key: it[1] for key, it in reports.items() if it[1]} == {}


def test_the_cache_holds_what_was_compiled(cache, reports):
    shown = command(cache).stdout
    assert str(cache) in shown and f"{len(reports)} kernels" in shown
    assert cache.stat().st_mode & 0o777 == 0o700
    assert all(entry.stat().st_mode & 0o777 == 0o600 for entry in cache.iterdir())
    assert command(cache, "--clear").returncode == 0
    assert list(cache.iterdir()) == []


def test_a_missing_nvrtc_is_named():
    environment = os.environ | {"FLASH_ATTENTION_NVRTC": "/nowhere/libnvrtc.so"}
    program = os.environ.get("FLASH_ATTN_PLUS") or Path(sys.executable).with_name("flash-attn-plus")
    result = subprocess.run(
        [str(program), "cache", "--precompile", "90"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "/nowhere/libnvrtc.so" in result.stderr


def test_the_nvrtc_of_the_programs_own_environment_is_found(tmp_path):
    program = os.environ.get("FLASH_ATTN_PLUS") or Path(sys.executable).with_name("flash-attn-plus")
    own = tmp_path / "bin" / "flash-attn-plus"
    own.parent.mkdir()
    shutil.copy2(program, own)
    wheel = tmp_path / "lib" / "python3.12" / "site-packages" / "nvidia" / "cu13"
    wheel.mkdir(parents=True)
    (wheel / "lib").symlink_to(nvrtc().parent)
    environment = os.environ | {"FLASH_ATTENTION_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("FLASH_ATTENTION_NVRTC", None)
    one = ["--precompile", "90", "--filter", "forward_sm90 bfloat16", "--num-shards", "1000"]
    result = subprocess.run(
        [str(own), "cache", *one], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0 and "registers" in result.stdout, result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has an NVIDIA GPU")
def test_without_a_gpu_each_implementation_says_why():
    listed = flash_attn.implementations("cuda")
    assert [it.name for it in listed] == ["cuda:sm90", "cuda:sm80"]
    assert all(not it.available and "driver" in it.reason for it in listed)
