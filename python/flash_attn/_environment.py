"""Every environment variable that Python code reads; for C++ src/core/environment.cc does."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

# The implementations in Python, which _backends.py chooses among.
PYTHON_BACKENDS = ("triton", "flaggems", "torch")


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "TRUE", "ON", "YES")


def wants_flaggems() -> bool:
    """Whether FLASH_ATTENTION_USE_FLAGGEMS asks for the Triton family, FlagGems first."""
    return _is_on("FLASH_ATTENTION_USE_FLAGGEMS")


_told = False


def tell_that_native_runs(device: str, reasons: str) -> None:
    """Warns, once, that a native implementation runs where the Triton family was asked for."""
    global _told
    if _told or not wants_flaggems():
        return
    _told = True
    warnings.warn(
        "FLASH_ATTENTION_USE_FLAGGEMS asks for the Triton family, which does not take this call;"
        f" the native implementation for {device} runs instead:{reasons}",
        RuntimeWarning,
        stacklevel=2,
    )


def backend() -> str:
    """The implementation or family that FLASH_ATTENTION_BACKEND forces; "" is none."""
    return os.environ.get("FLASH_ATTENTION_BACKEND", "")


def native_serves_cpu() -> bool:
    """Whether calls on the CPU go to the native library, with no other asked for."""
    return not wants_flaggems() and backend() not in PYTHON_BACKENDS


def verbose_dispatch() -> bool:
    """Whether FLASH_ATTENTION_VERBOSE asks to tell which implementation runs each call."""
    return "dispatch" in os.environ.get("FLASH_ATTENTION_VERBOSE", "")


def checks_values() -> bool:
    """Whether FLASH_ATTENTION_CHECK asks to look at lengths and pages that lie on a device."""
    return _is_on("FLASH_ATTENTION_CHECK")


def autotunes() -> bool:
    """Whether FLASH_ATTENTION_AUTOTUNE asks to measure the tiles of Triton kernels."""
    return _is_on("FLASH_ATTENTION_AUTOTUNE")


def cache_folder() -> Path:
    """Where what was measured is kept, and the native library's kernels are."""
    given = os.environ.get("FLASH_ATTENTION_CACHE_DIR")
    if given:
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "flash-attention-plus"
