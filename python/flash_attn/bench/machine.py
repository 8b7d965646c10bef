"""The machine: what it is, what runs on it, and what it can reach."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from flash_attn import _native, plus_version

CEILINGS = ("fp32_fma", "bf16_dot", "amx_bf16", "memory_read")
# The best instructions for products of a dtype, and those that it is widened for.
_ARITHMETIC = {
    "float32": ("fp32_fma",),
    "float16": ("fp32_fma",),
    "bfloat16": ("amx_bf16", "bf16_dot", "fp32_fma"),
}
_ENVIRONMENT = re.compile(r"FLASH_ATTENTION_|OMP_|GOMP_|KMP_|MKL_NUM|ONEDNN_|LD_PRELOAD")
_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16",
    "asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """The processor, its caches and memory, threads, versions, and the settings that matter."""
    count, source = _native.num_threads()
    return {
        "processor": _processor_name(),
        "architecture": platform.machine(),
        "processors": os.cpu_count(),
        "allowed_processors": len(os.sched_getaffinity(0)),
        "instruction_sets": [name for name in _FEATURES if name in _processor_flags()],
        "last_level_cache_bytes": _cache_bytes(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.platform(),
        "threads": int(count),
        "threads_of": str(source),
        "environment": {k: v for k, v in sorted(os.environ.items()) if _ENVIRONMENT.match(k)},
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    versions = {"flash-attention-plus": plus_version, "python": platform.python_version()}
    versions["torch"] = torch.__version__
    for name in ("numpy", "onnxruntime", "xformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpuinfo(keys: str) -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text(errors="replace") if path.exists() else ""
    match = re.search(rf"^(?:{keys})\s*: (.*)$", text, flags=re.MULTILINE)
    return match.group(1).strip() if match else ""


def _processor_name() -> str:
    return _cpuinfo("model name|cpu|uarch") or platform.processor() or platform.machine()


def _processor_flags() -> set[str]:
    return set(_cpuinfo("flags|Features").split())


def _cache_bytes() -> int:
    try:
        return max(0, os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    except (OSError, ValueError):  # not every system has the name
        return 0


def measure_ceilings(num_threads: int) -> dict[str, float]:
    """Operations (memory: bytes) per second of each kind that the machine has, in G.

    Registers only for arithmetic, more memory than the caches hold for reads.
    """
    ceilings = {}
    for kind in CEILINGS:
        try:
            ceilings[kind] = _native.measure_ceiling(kind, num_threads) / 1e9
        except NotImplementedError:
            continue
    return ceilings


def ceiling_of(dtype: str, mode: str, ceilings: dict[str, float]) -> str:
    """Which of the measured ceilings a case is held against."""
    if mode == "decode":
        return "memory_read"
    return next(kind for kind in _ARITHMETIC[dtype] if kind in ceilings)
